"""Linear layers whose weight and input are both codes become products of these codes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import fx

from quarot_fx.aliasing import equal_sizes
from quarot_fx.graph import PART, Inserter, after, argument_nodes, is_tensor
from quarot_fx.linear_like import LAYERS, Layer, LinearLike, linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.quantized import QuantizedActivation, QuantizedWeight, quantized_activation, quantized_weight
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles

aten, quarot = torch.ops.aten, torch.ops.quarot
CONTAINER = torch.int8  # of an activation's codes


class Operand(NamedTuple):
    """An activation as a product takes it, [..., n] and [..., groups]."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    sum: fx.Node


@dataclass(frozen=True)
class FuseIntLinears(Pass):
    """``linear(s (x - z), t (w - v)) -> s t ((x - z) (w - v)^T)``, the product exact in integers, and with it the
    addition of a bias and of the residual stream.
    """

    requires: ClassVar[tuple[str, ...]] = ("quantize-weights", "quantize-activations")
    tolerance: ClassVar[float | None] = None  # its scales are float32, and a dequantised operand is no longer rounded

    def run(self, program: Program, report: PassReport) -> None:
        roles = Roles(program.graph, self.config)
        layers = [(linear, roles.role(linear)) for linear in linear_likes(program.graph)]
        operands: dict[fx.Node, Operand] = {}
        for linear, role in layers:
            x, weight = quantized_activation(linear.x), quantized_weight(linear.weight)
            if x is None or weight is None:
                if x or weight:
                    left = "weight" if x else "input"
                    report.decline(linear.parameter, f"its {left} is not quantised: kernels multiply codes by codes")
            elif linear.node.target is not aten.linear.default:
                report.decline(linear.parameter, f"no kernel multiplies by a stack of matrices: {linear.node.target}")
            else:
                if x.dequantized not in operands:
                    operands[x.dequantized] = self._operand(linear, x)
                self._fuse(linear, role, x, weight, operands[x.dequantized], report)

    def _operand(self, linear: LinearLike, x: QuantizedActivation) -> Operand:
        insert, scheme = Inserter(linear.node.graph, self.name, linear.node), x.scheme
        with insert.graph.inserting_before(after(x.source)):
            parts = insert.call(
                quarot.quantize_activation.default,
                x.source, scheme.bits, scheme.group, scheme.clip, scheme.symmetric, CONTAINER,
            )  # fmt: skip
            codes, scale, zero, sums = (insert.call(operator.getitem, parts, index) for index in range(4))
        return Operand(codes, scale, None if scheme.symmetric else zero, sums)

    def _fuse(
        self,
        linear: LinearLike,
        role: str,
        x: QuantizedActivation,
        weight: QuantizedWeight,
        operand: Operand,
        report: PassReport,
    ) -> None:
        node, insert = linear.node, Inserter(linear.node.graph, self.name, linear.node)
        addition, residual = _addition(node)
        with node.graph.inserting_before(addition or node):  # where the residual is known
            packed = _pack(insert, weight, x)
            fused = insert_fused(
                insert, self.config, report, quarot.int_linear.default,
                *operand, *packed, linear.bias, residual, node.meta["val"].dtype,
            )  # fmt: skip
        if fused is not None:
            fused.meta[LAYERS] = (
                Layer(node.name, linear.parameter, weight.bits, x.scheme.bits, role, weight.rounding, x.scheme.clip),
            )
            (addition or node).replace_all_uses_with(fused)


def _addition(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the addition that alone reads a product, if the product's shape is its shape, and what it adds."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None, None
    others = [operand for operand in argument_nodes(user) if operand is not node]
    if len(others) != 1 or not is_tensor(others[0]):
        return None, None
    vals = [one.meta["val"] for one in (node, user, others[0])]
    if len({val.dtype for val in vals}) > 1 or not all(equal_sizes(val.shape, vals[0].shape) for val in vals):
        return None, None
    return user, others[0]


def _pack(
    insert: Inserter, weight: QuantizedWeight, x: QuantizedActivation
) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None, int]:
    """Insert what ``int_linear`` takes of a weight: codes in its layout, scale, zero and sum of codes, bits."""
    bits = 4 if weight.bits <= 4 else 8  # smaller codes than these take the room of one of these
    packed = _named(insert.call(quarot.pack_weight.default, weight.codes, bits), "codes")
    zero = weight.zero
    if zero is not None:
        zero = insert.call(aten.to.dtype, zero, torch.int32)
        if bits == 8:  # the layout holds unsigned codes less 128
            zero = insert.call(aten.sub.Tensor, zero, 128)
        zero = _named(zero, "zero")
    sums = None if x.scheme.symmetric else _named(_sums(insert, weight, x), "sum")
    return packed, weight.scale, zero, sums, bits


def _sums(insert: Inserter, weight: QuantizedWeight, x: QuantizedActivation) -> fx.Node:
    """Insert the sums of codes less zero points over the groups that are one for both operands."""
    rows, of_weight = weight.scale.meta["val"].shape
    size = weight.codes.meta["val"].shape[-1]
    groups = max(of_weight, 1 if x.scheme.group is None else size // x.scheme.group)
    codes = insert.call(aten.to.dtype, weight.codes, torch.int32)
    if weight.zero is not None:
        codes = insert.call(aten.reshape.default, codes, [rows, of_weight, size // of_weight])
        zero = insert.call(aten.to.dtype, weight.zero, torch.int32)
        codes = insert.call(aten.sub.Tensor, codes, insert.call(aten.unsqueeze.default, zero, -1))
    codes = insert.call(aten.reshape.default, codes, [rows, groups, size // groups])
    return insert.call(aten.to.dtype, insert.call(aten.sum.dim_IntList, codes, [-1]), torch.int32)


def _named(node: fx.Node, part: str) -> fx.Node:
    node.meta[PART] = part
    return node
