"""Linear layers whose result is only ever split become one layer per part, so that each part can have its own basis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quarot_fx.graph import Inserter, argument_nodes, module_path
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.passes.base import Pass
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
            if linear.weight.meta["val"].ndim != 2 or linear.bias is not None and linear.bias.meta["val"].ndim != 1:
                continue
            chain = _chain(linear)
            parts = list(_parts(linear, chain)) if chain else []
            if not parts:
                continue
            if any(part.rows.numel() == 0 for part in parts):
                report.decline(module_path(linear.node), "a part of a packed layer is empty")
                continue
            for part in parts:
                _make(linear, chain, part, self.name)
                report.weights += 1
            report.matched += 1


def _chain(linear: LinearLike) -> list[fx.Node]:
    """Return the linear layer and the views and moves of axes after it, up to where its result is split."""
    out = linear.node.meta["val"].shape[-1]
    chain = [linear.node]
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        is_first_view = str(user.target) in VIEWS and len(chain) == 1 and _split_of_last_axis(linear.node, user, out)
        if not is_first_view and not (str(user.target) in MOVES and len(chain) > 1):
            break
        chain.append(user)
    takes = [user for user in chain[-1].users if str(user.target) in SPLITS | TAKES]
    return chain if takes and len(takes) == len(chain[-1].users) else []


def _split_of_last_axis(linear: fx.Node, view: fx.Node, out: int) -> int | None:
    """Return into how many axes a view splits the last one, all others left alone; None if it does not."""
    extra = view.meta["val"].ndim - linear.meta["val"].ndim + 1
    sizes = view.meta["val"].shape[-extra:] if extra > 0 else ()
    return extra if all(isinstance(s, int) for s in sizes) and sizes and math.prod(sizes) == out else None


def _parts(linear: LinearLike, chain: list[fx.Node]) -> Iterator[Part]:
    """Yield the parts; nothing at all if some taking is not along an axis of the packed result."""
    node, last = linear.node, chain[-1]
    lead = node.meta["val"].ndim - 1
    rows = torch.arange(node.meta["val"].shape[-1])
    rows = rows.reshape([1] * lead + list(chain[1].meta["val"].shape[lead:] if len(chain) > 1 else rows.shape))
    for move in chain[2:]:
        rows = move.target(rows, *move.args[1:])  # type: ignore[operator]
    found: list[Part] = []
    for take in last.users:
        dim = _dim(take) % rows.ndim
        if rows.shape[dim] != last.meta["val"].shape[dim] or argument_nodes(take) != [last]:
            return
        pieces = take.target(rows, *take.args[1:], **take.kwargs)  # type: ignore[operator]
        if str(take.target) in SPLITS:
            if any(getattr(user.target, "__name__", "") != "getitem" for user in take.users):
                return
            found += [Part(user, pieces[user.args[1]]) for user in take.users]  # type: ignore[index]
        elif pieces.shape != rows.shape:
            found.append(Part(take, pieces))
        else:
            return
    yield from found


def _dim(take: fx.Node) -> int:
    place = 1 if str(take.target) in {"aten.slice.Tensor", "aten.select.int", "aten.unbind.int"} else 2
    return take.args[place] if len(take.args) > place else take.kwargs.get("dim", 0)  # type: ignore[return-value]


def _make(linear: LinearLike, chain: list[fx.Node], part: Part, author: str) -> None:
    """Insert the layer that makes one part, in the shape and layout in which it was taken."""
    node, target = linear.node, part.node
    graph = node.graph
    insert = Inserter(graph, author, node)
    lead = node.meta["val"].ndim - 1
    with graph.inserting_before(node.next):
        rows = insert.constant("rows", part.rows.reshape(-1).sort().values)
        axis = linear.spelling.out + 2
        args = list(node.args)
        args[linear.spelling.weight] = insert.call(aten.index_select.default, linear.weight, axis, rows)
        if linear.bias is not None:
            args[linear.spelling.bias or 0] = insert.call(aten.index_select.default, linear.bias, 0, rows)
        result = insert.call(node.target, *args)  # type: ignore[arg-type]
    with graph.inserting_before(target):
        if len(chain) > 1:
            result = _reshaped(insert, result, chain, part, lead)
        if result.meta["val"].ndim > target.meta["val"].ndim:
            result = insert.call(aten.squeeze.dim, result, _dim(target if str(target.target) in TAKES else argument_nodes(target)[0]))
    target.replace_all_uses_with(result)


def _reshaped(insert: Inserter, result: fx.Node, chain: list[fx.Node], part: Part, lead: int) -> fx.Node:
    """Replay the views of the packed result on one part; a selected axis stays with size 1."""
    order = list(range(chain[1].meta["val"].ndim))
    for move in chain[2:]:
        order = _moved(order, move)
    taken = list(part.rows.shape)
    if len(taken) < len(order):
        take = part.node if str(part.node.target) in TAKES else argument_nodes(part.node)[0]
        taken.insert(_dim(take) % len(order), 1)
    sizes = [taken[order.index(dim)] for dim in range(lead, len(order))]
    view = list(chain[1].args[1])[:lead] + sizes  # type: ignore[arg-type,call-overload]
    result = insert.call(aten.reshape.default, result, view)
    for move in chain[2:]:
        result = insert.call(move.target, result, *move.args[1:])  # type: ignore[arg-type]
    return result


def _moved(order: list[int], move: fx.Node) -> list[int]:
    if str(move.target) == "aten.permute.default":
        return [order[dim] for dim in move.args[1]]  # type: ignore[union-attr]
    first, second = move.args[1], move.args[2]
    order = list(order)
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return order
