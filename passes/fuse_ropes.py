"""A rotary embedding and what is done to each head after it, its balance and its rotation, become one op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import PERMUTATIONS, argument, equal_sizes, inverse_permutation, packet
from quarot_fx.graph import FROZEN, Inserter, module_path, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.matching import before_casts, before_views, before_widening, insert_views, operands
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
HEADS, TOKENS = 1, 2  # the axes of queries and keys, as the op takes them
MOVED = "axes are moved in an unusual way between the embedding and the balance of heads"
PARTLY = "only a part of each head is embedded, and all of it rotated"
APPENDED = "what is embedded is appended to a cache before all of it is rotated"


@dataclass(frozen=True)
class Rope:
    """``x * cos + half_turn(x) * sin`` with ``half_turn([a, b]) = [-b, a]``.

    Attributes:
        x: [batch, heads, tokens, size], or [batch, tokens, heads, size].
        cos, sin: the same with one head and with a batch or with 1 in its place, or without leading dimensions.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node

    def is_of_heads(self, axis: int) -> bool:
        """Whether cos and sin can be read as if this axis of x, 1 or 2, were that of heads, and the other of tokens."""
        batch, *_, size = value(self.x).shape
        tokens = value(self.x).shape[HEADS + TOKENS - axis]
        for angle in (self.cos, self.sin):
            shape = [1] * (4 - value(angle).ndim) + list(value(angle).shape)
            heads = shape.pop(axis)
            if heads != 1 or not (equal_sizes(shape, (1, tokens, size)) or equal_sizes(shape, (batch, tokens, size))):
                return False
        return True


@dataclass(frozen=True)
class FuseRopes(Pass):
    """``rotate(x cos + half_turn(x) sin) -> rope_rotate(x, cos, sin)`` along the axis of a head (QuaRot, section 4,
    stage 2c), with a balance of heads in between where there is one. Where nothing is rotated afterwards, it is left to
    the compiler of the rest.
    """

    requires: ClassVar[tuple[str, ...]] = ("rotate",)
    tolerance: ClassVar[float | None] = None  # it computes in float32

    def run(self, program: Program, report: PassReport) -> None:
        for rotate in program.graph.find_nodes(op="call_function", target=quarot.rotate.default):
            source, views = before_views(rotate.args[0])
            balance, moves = None, ()
            if source.target is quarot.balance.default:
                balance = source
                source, moves = before_views(argument(balance, "x"))
            rope = next(_ropes(source), None)
            if rope is None:
                if source.target is aten.cat.default and any(list(_ropes(part)) for part in source.all_input_nodes):
                    report.decline(module_path(source), PARTLY if _is_along_last_axis(source) else APPENDED)
            elif reason := _reason_against(rotate, rope):
                report.decline(module_path(source), reason)
            elif balance is not None and not _puts_heads_first(rope, moves):
                report.decline(module_path(source), MOVED)
            else:
                self._fuse(rotate, rope, balance, views, report)

    def _fuse(
        self, rotate: fx.Node, rope: Rope, balance: fx.Node | None, views: tuple[fx.Node, ...], report: PassReport
    ) -> None:
        insert = Inserter(rotate.graph, self.name, rotate)
        axis = HEADS if rope.is_of_heads(HEADS) else TOKENS
        with rotate.graph.inserting_before(rotate):
            x = rope.x if axis == HEADS else insert.call(aten.transpose.int, rope.x, HEADS, TOKENS)
            angles = [_without_heads(insert, angle, axis) for angle in (rope.cos, rope.sin)]
            arguments = [x, *angles, argument(rotate, "rotation")]
            if balance is not None:
                arguments += [argument(balance, name) for name in ("balance", "inverse")]
            fused = insert_fused(insert, self.config, report, quarot.rope_rotate.default, *arguments)
            if fused is not None:
                if axis == TOKENS and balance is None:  # a balance has heads first, too
                    fused = insert.call(aten.transpose.int, fused, HEADS, TOKENS)
                rotate.replace_all_uses_with(insert_views(insert, fused, views))


def _ropes(node: fx.Node) -> Iterator[Rope]:
    """Yield the rotary embedding that a node is the result of."""
    node = before_casts(node)
    for straight, across in operands(node, aten.add.Tensor):
        for x, cos in operands(before_casts(straight), aten.mul.Tensor):
            for turned, sin in operands(before_casts(across), aten.mul.Tensor):
                embedded = _half_turned(before_casts(turned))
                if embedded is not None and embedded is before_widening(x) and FROZEN not in embedded.meta:
                    yield Rope(embedded, cos, sin)


def _half_turned(node: fx.Node) -> fx.Node | None:
    """Return x if the node is ``[-b, a]`` for the halves of x = ``[a, b]`` along the last axis."""
    if node.target is not aten.cat.default or not _is_along_last_axis(node):
        return None
    parts = [before_casts(part) for part in argument(node, "tensors")]
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    second, first = before_casts(parts[0].all_input_nodes[0]), parts[1]
    x = _half(first, 0)
    return x if x is not None and x is _half(second, 1) else None


def _half(node: fx.Node, place: int) -> fx.Node | None:
    """Return x if the node is the first or the second half of x along the last axis."""
    if node.target is not aten.slice.Tensor or not _is_along_last_axis(node):
        return None
    x, bounds = node.all_input_nodes[0], [argument(node, name) for name in ("start", "end", "step")]
    size = value(x).shape[-1]
    if not all(bound is None or isinstance(bound, int) for bound in (*bounds, size)):
        return None
    half = size // 2
    return before_widening(x) if slice(*bounds).indices(size) == (place * half, (place + 1) * half, 1) else None


def _is_along_last_axis(node: fx.Node) -> bool:
    ndim = value(node).ndim
    return bool(argument(node, "dim") % ndim == ndim - 1)


def _reason_against(rotate: fx.Node, rope: Rope) -> str | None:
    val, x = value(rotate), value(rope.x)
    if x.ndim != 4:
        return f"what is embedded has {x.ndim} axes, and the kernel takes batch, heads, tokens and size"
    if not _is_along_last_axis(rotate) or argument(rotate, "inner") != 1:
        return "another axis than that of a head is rotated"
    if argument(rotate, "inverse"):
        return "a rotation is undone, and the kernel only rotates"
    if x.dtype != val.dtype:
        return f"what is embedded is {x.dtype}, and what is rotated {val.dtype}"
    if not rope.is_of_heads(HEADS) and not rope.is_of_heads(TOKENS):
        shapes = " and ".join(str(tuple(value(one).shape)) for one in (rope.x, rope.cos))
        return f"angles are not the same for all heads, and for every token their own: {shapes}"
    return None


def _puts_heads_first(rope: Rope, moves: tuple[fx.Node, ...]) -> bool:
    """Whether views make what is embedded [batch, heads, tokens, size]."""
    if not moves:
        return rope.is_of_heads(HEADS)
    is_exchange = packet(moves[0]) in PERMUTATIONS and tuple(inverse_permutation(moves[0])) == (0, TOKENS, HEADS, 3)
    return len(moves) == 1 and is_exchange and rope.is_of_heads(TOKENS)


def _without_heads(insert: Inserter, angle: fx.Node, axis: int) -> fx.Node:
    """Return angles [batch or 1, tokens, size] of those for one head."""
    angle = before_widening(angle)
    if angle.target is aten.unsqueeze.default and angle.args[1] in (axis, axis - 4):
        return angle.all_input_nodes[0]
    for _ in range(4 - value(angle).ndim):
        angle = insert.call(aten.unsqueeze.default, angle, 0)
    return insert.call(aten.squeeze.dim, angle, axis)
