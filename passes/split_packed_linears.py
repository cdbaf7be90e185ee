"""Linear layers whose result is only ever split become one layer per part, so that each part can have its own basis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from quarot_fx.graph import Inserter, argument_nodes, module_path
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.passes.readers import keeps_last_axis
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
SPLITS = {"aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int"}
TAKES = {"aten.slice.Tensor", "aten.select.int"}
VIEWS = {"aten.view.default", "aten.reshape.default"}
MOVES = {"aten.transpose.int", "aten.permute.default"}
HAS_BIAS_ARGUMENT = {"aten.linear.default", "aten.addmm.default"}


@dataclass(frozen=True)
class Part:
    """One part of a packed result: the node that holds it, and the rows of the weight that make it."""

    node: fx.Node
    rows: Tensor


@dataclass(frozen=True)
class SplitPackedLinears(Pass):
    """``split(W x) = (W_1 x, W_2 x, ...)``: queries, keys and values, or gate and up, packed into one weight."""

    def run(self, program: Program, report: PassReport) -> None:
        for linear in list(linear_likes(program.graph)):
            if linear.weight.meta["val"].ndim != 2 or not linear.adds_at_most_a_vector:
                continue
            chain = _chain(linear)
            parts = list(_parts(linear, chain)) if chain else []
            if not chain or not parts:
                continue
            if any(part.rows.numel() == 0 for part in parts):
                report.decline(module_path(linear.node), "a part of a packed layer is empty")
                continue
            for part in parts:
                _make(linear, chain, part, self.name)
                report.weights += 1
            report.matched += 1


@dataclass(frozen=True)
class Chain:
    """What stands between a packed layer and the splitting of its result.

    Attributes:
        leads: views and moves of the batch axes; the packed axis stays whole and last.
        view: a view that splits the packed axis, if there is one.
        moves: transposes and permutations after that view.
        last: the node that is split.
    """

    leads: tuple[fx.Node, ...]
    view: fx.Node | None
    moves: tuple[fx.Node, ...]
    last: fx.Node

    @property
    def batch(self) -> int:
        """Number of axes in front of the packed one, or of those that it was split into."""
        if self.view is None:
            return self.last.meta["val"].ndim - 1
        return self.view.meta["val"].ndim - _packed_axes(argument_nodes(self.view)[0], self.view)


def _chain(linear: LinearLike) -> Chain | None:
    """Follow a layer's result to where it is split; None if anything else is done with it."""
    leads: list[fx.Node] = []
    view = None
    moves: list[fx.Node] = []
    last = linear.node
    while len(last.users) == 1:
        user = next(iter(last.users))
        if view is None and _is_lead(user):
            leads.append(user)
        elif view is None and str(user.target) in VIEWS and _packed_axes(last, user):
            view = user
        elif str(user.target) in MOVES and view is not None:
            moves.append(user)
        else:
            break
        last = user
    takes = [user for user in last.users if str(user.target) in SPLITS | TAKES]
    return Chain(tuple(leads), view, tuple(moves), last) if takes and len(takes) == len(last.users) else None


def _is_lead(node: fx.Node) -> bool:
    """Whether a node arranges the batch axes and leaves the last one where it is, whole."""
    if str(node.target) in MOVES:
        rank = node.meta["val"].ndim
        return _moved(list(range(rank)), node)[-1] == rank - 1
    return str(node.target) in VIEWS | {"aten.unsqueeze.default"} and keeps_last_axis(node)


def _packed_axes(source: fx.Node, view: fx.Node) -> int:
    """Return into how many axes, the last ones, a view splits the last axis of its source; 0 if it does not."""
    shape, size = view.meta["val"].shape, source.meta["val"].shape[-1]
    for count in range(2, len(shape) + 1):
        sizes = shape[-count:]
        if not all(isinstance(s, int) for s in sizes) or math.prod(sizes) > size:
            return 0
        if math.prod(sizes) == size:
            return count
    return 0


def _parts(linear: LinearLike, chain: Chain) -> Iterator[Part]:
    """Yield the parts; nothing at all if some taking is not along an axis of the packed result."""
    last = chain.last
    rows = torch.arange(linear.node.meta["val"].shape[-1])
    sizes = chain.view.meta["val"].shape[chain.batch :] if chain.view else rows.shape
    rows = rows.reshape([1] * chain.batch + list(sizes))
    for move in chain.moves:
        rows = move.target(rows, *move.args[1:])  # type: ignore[operator]
    found: list[Part] = []
    for take in last.users:
        dim = _dim(take) % rows.ndim
        if rows.shape[dim] != last.meta["val"].shape[dim] or argument_nodes(take) != [last]:
            return
        pieces: Any = take.target(rows, *take.args[1:], **take.kwargs)  # type: ignore[operator]
        if str(take.target) in SPLITS:
            if any(getattr(user.target, "__name__", "") != "getitem" for user in take.users):
                return
            found += [Part(user, pieces[user.args[1]]) for user in take.users]
        elif pieces.shape != rows.shape:
            found.append(Part(take, pieces))
        else:
            return
    yield from found


def _dim(take: fx.Node) -> int:
    place = 1 if str(take.target) in {"aten.slice.Tensor", "aten.select.int", "aten.unbind.int"} else 2
    return take.args[place] if len(take.args) > place else take.kwargs.get("dim", 0)  # type: ignore[return-value]


def _make(linear: LinearLike, chain: Chain, part: Part, author: str) -> None:
    """Insert the layer that makes one part, in the shape and layout in which it was taken."""
    node, target = linear.node, part.node
    graph = node.graph
    insert = Inserter(graph, author, node)
    with graph.inserting_before(node.next):
        rows = insert.constant("rows", part.rows.reshape(-1).sort().values.to(linear.weight.meta["val"].device))
        axis = linear.spelling.out + 2
        args = list(node.args)
        args[linear.spelling.weight] = insert.call(aten.index_select.default, linear.weight, axis, rows)
        if linear.bias is not None:
            args[linear.spelling.bias or 0] = insert.call(aten.index_select.default, linear.bias, 0, rows)
        result = insert.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
    with graph.inserting_before(target):
        for lead in chain.leads:
            rest = list(lead.args[1:])
            if str(lead.target) in VIEWS:
                rest = [[*list(lead.args[1])[:-1], part.rows.numel()]]  # type: ignore[arg-type]
            result = insert.call(lead.target, result, *rest)  # type: ignore[arg-type]
        if chain.view is not None:
            result = _reshaped(insert, result, chain, part)
        if result.meta["val"].ndim > target.meta["val"].ndim:
            result = insert.call(
                aten.squeeze.dim,
                result,
                _dim(target if str(target.target) in TAKES else argument_nodes(target)[0]),
            )
    target.replace_all_uses_with(result)


def _reshaped(insert: Inserter, result: fx.Node, chain: Chain, part: Part) -> fx.Node:
    """Replay the views of the packed result on one part; a selected axis stays with size 1."""
    assert chain.view is not None
    batch = chain.batch
    order = list(range(chain.view.meta["val"].ndim))
    for move in chain.moves:
        order = _moved(order, move)
    taken = list(part.rows.shape)
    if len(taken) < len(order):
        take = part.node if str(part.node.target) in TAKES else argument_nodes(part.node)[0]
        taken.insert(_dim(take) % len(order), 1)
    sizes = [taken[order.index(dim)] for dim in range(batch, len(order))]
    view = list(chain.view.args[1])[:batch] + sizes  # type: ignore[arg-type]
    result = insert.call(aten.reshape.default, result, view)
    for move in chain.moves:
        result = insert.call(move.target, result, *move.args[1:])  # type: ignore[arg-type]
    return result


def _moved(order: list[int], move: fx.Node) -> list[int]:
    if str(move.target) == "aten.permute.default":
        return [order[dim] for dim in cast(list[int], move.args[1])]
    first, second = cast(tuple[int, int], move.args[1:3])
    order = list(order)
    order[first], order[second] = order[second], order[first]
    return order
