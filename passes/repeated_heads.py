"""Keys and values before each head was repeated for the queries that share it."""

from __future__ import annotations

import math

import torch
from torch import fx

from quarot_fx.aliasing import PERMUTATIONS, argument, equal_sizes, inverse_permutation, packet
from quarot_fx.graph import FROZEN, Inserter, value
from quarot_fx.passes.matching import VIEWS, before_copies

aten = torch.ops.aten
EXPANSIONS = (aten.expand.default, aten.repeat.default)  # which do the same to an axis of one element


def before_repetition(insert: Inserter, repeated: fx.Node) -> fx.Node:
    """Return keys or values [..., heads, tokens, size] with every head once, or as they are if none is repeated.

    Heads may be repeated before axes are moved to where attention wants them: they are then moved without.
    """
    moves: list[fx.Node] = []
    node, axis = before_copies(repeated), value(repeated).ndim - 3
    while packet(node) in PERMUTATIONS and (source := _source(node)) is not None:
        moves.append(node)
        node, axis = before_copies(source), inverse_permutation(node).index(axis)
    heads = _heads_once(insert, node, axis) if axis >= 0 else None
    if heads is None:
        return repeated
    for move in reversed(moves):
        heads = insert.call(move.target, heads, *move.args[1:], **move.kwargs)  # type: ignore[arg-type]
    return heads


def _heads_once(insert: Inserter, node: fx.Node, axis: int) -> fx.Node | None:
    """Return what a node repeats along an axis, each element several times in a row."""
    if node.target is aten.repeat_interleave.self_int:
        return _source(node) if argument(node, "dim") in (axis, axis - value(node).ndim) else None
    if (only := _before_expansion(node, axis)) is not None:
        return only
    if node.target not in VIEWS or (source := _source(node)) is None:
        return None
    copies = before_copies(source)
    single = _before_expansion(copies, axis + 1)
    sizes = list(value(copies).shape)
    sizes[axis : axis + 2] = [math.prod(sizes[axis : axis + 2])]  # views keep elements in order: sizes tell what merged
    if single is None or not equal_sizes(value(node).shape, sizes):
        return None
    return _without_axis(insert, single, axis + 1)


def _without_axis(insert: Inserter, node: fx.Node, axis: int) -> fx.Node:
    """Return a tensor without an axis of one element: what it was before a view gave it one, if that is what it is."""
    source = _source(node) if node.target in VIEWS else None
    sizes = [*value(node).shape[:axis], *value(node).shape[axis + 1 :]]
    if source is not None and equal_sizes(value(source).shape, sizes):
        return source
    return insert.call(aten.squeeze.dim, node, axis)


def _before_expansion(node: fx.Node, axis: int) -> fx.Node | None:
    """Return what has one element along an axis where a node has copies of it."""
    if node.target not in EXPANSIONS or axis >= value(node).ndim or (source := _source(node)) is None:
        return None
    sizes = list(value(node).shape)
    sizes[axis] = 1
    return source if equal_sizes(value(source).shape, sizes) else None


def _source(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a node copies or views, unless its content may have changed since."""
    source = node.all_input_nodes[0]
    return None if FROZEN in node.meta or FROZEN in source.meta else source
