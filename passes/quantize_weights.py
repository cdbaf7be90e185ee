"""Weights become packed integer codes with scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from quarot_fx.passes.base import Pass
from torch import Tensor, fx

from quarot_fx.clip_search import quantize_weight
from quarot_fx.config import UNQUANTIZED_BITS, QuantScheme
from quarot_fx.errors import GroupSizeError
from quarot_fx.float64 import evaluate
from quarot_fx.graph import Inserter, replace_arguments
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """``W -> scale (codes - zero)`` per output channel or group, round to nearest with a searched clip ratio
    (QuaRot, section 4, stage 2a).
    """

    requires: ClassVar[tuple[str, ...]] = ("rotate",)
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program, report: PassReport) -> None:
        roles = Roles(program.graph)
        for linear in list(linear_likes(program.graph)):
            scheme = self.config.for_parameter(linear.parameter).weight_scheme
            why = roles.keeps_precision(linear)
            if why and not self.config.override_for(linear.parameter):
                report.decline(linear.parameter, f"{why}; name it in overrides to quantise it")
            elif scheme.bits == UNQUANTIZED_BITS:
                report.decline(linear.parameter, "w_bits=16 asks to leave it alone")
            elif not _is_quantized(linear.weight):
                self._quantize(program, linear, scheme)
                report.matched += 1
                report.weights += 1

    def _quantize(self, program: Program, linear: LinearLike, scheme: QuantScheme) -> None:
        weight, node = linear.weight, linear.node
        size = weight.meta["val"].shape[linear.spelling.contracted]
        if scheme.group is not None and size % scheme.group:
            raise GroupSizeError(option="w_group", group=scheme.group, size=size, where=linear.parameter)
        is_transposed = linear.spelling.contracted != -1
        parts: dict[str, Tensor | None] = {}

        def part(name: str) -> Tensor:
            if not parts:
                rows = evaluate(weight)
                parts.update(_packed(rows.mT if is_transposed else rows, scheme))
            found = parts[name]
            assert found is not None
            return found

        def stored(name: str) -> fx.Node:
            purpose = f"{name} of {scheme} transposed={is_transposed}"
            tensor = program.constant(weight, purpose, lambda: part(name))
            return insert.constant(f"{linear.parameter}.{name}", tensor, linear.parameter)

        insert = Inserter(node.graph, self.name, node)
        with node.graph.inserting_before(node):
            codes = insert.call(quarot.unpack.default, stored("codes"), scheme.bits, size, scheme.symmetric)
            scale = stored("scale")
            zero = None if scheme.symmetric else stored("zero")
            dense = insert.call(quarot.dequantize.default, codes, scale, zero, weight.meta["val"].dtype)
            if is_transposed:
                dense = insert.call(aten.transpose.int, dense, -2, -1)
        replace_arguments(node, {linear.spelling.weight: dense})


def _packed(rows: Tensor, scheme: QuantScheme) -> dict[str, Tensor | None]:
    """Quantise a weight ``[..., out, in]`` and pack its codes."""
    codes, scale, zero = quantize_weight(rows.float(), scheme)
    return {"codes": quarot.pack(codes, scheme.bits), "scale": scale.float(), "zero": zero}


def _is_quantized(weight: fx.Node) -> bool:
    if str(weight.target) == "aten.transpose.int":
        weight = weight.all_input_nodes[0]
    return str(weight.target) == "quarot.dequantize.default"
