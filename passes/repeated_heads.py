"""Keys and values before each head was repeated for the queries that share it."""

from __future__ import annotations

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
    while packet(node) in PERMUTATIONS and FROZEN not in node.meta:
        moves.append(node)
        node, axis = before_copies(node.all_input_nodes[0]), inverse_permutation(node).index(axis)
    heads = _heads_once(node, axis) if axis >= 0 else None
    if heads is None or FROZEN in heads.meta:
        return repeated
    for move in reversed(moves):
        heads = insert.call(move.target, heads, *move.args[1:], **move.kwargs)  # type: ignore[arg-type]
    return heads


def _heads_once(node: fx.Node, axis: int) -> fx.Node | None:
    """Return what a node repeats along an axis, each element several times in a row."""
    if FROZEN in node.meta:
        return None
    if node.target is aten.repeat_interleave.self_int:
        return node.all_input_nodes[0] if argument(node, "dim") in (axis, axis - value(node).ndim) else None
    if (single := _before_expansion(node, axis)) is not None or node.target not in VIEWS:
        return single  # the only head there is
    copies = before_copies(node.all_input_nodes[0])
    single = _before_expansion(copies, axis + 1)
    if single is None or single.target not in VIEWS or FROZEN in single.meta:
        return None
    # These views keep elements in their order, so that sizes tell which axes were split and merged.
    heads = single.all_input_nodes[0]
    outer, (count, *inner) = value(heads).shape[:axis], value(heads).shape[axis:]
    times = value(copies).shape[axis + 1]
    is_split = equal_sizes(value(copies).shape, (*outer, count, times, *inner))
    is_merged = equal_sizes(value(node).shape, (*outer, count * times, *inner))
    return heads if is_split and is_merged else None


def _before_expansion(node: fx.Node, axis: int) -> fx.Node | None:
    """Return what has one element along an axis where a node has copies of it."""
    if node.target not in EXPANSIONS or FROZEN in node.meta or axis >= value(node).ndim:
        return None
    source, sizes = node.all_input_nodes[0], list(value(node).shape)
    sizes[axis] = 1
    return source if equal_sizes(value(source).shape, sizes) else None
