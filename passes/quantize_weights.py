"""Weights become packed integer codes with scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quarot_fx.config import UNQUANTIZED_BITS, QuantScheme
from quarot_fx.graph import Inserter, replace_arguments
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.passes.quantized import ROUNDING, insert_packed, quantized_weight
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """``W -> scale (codes - zero)`` per output channel or group, rounded to nearest or by GPTQ, with a
    searched clip ratio (QuaRot, section 4, stage 2a).
    """

    requires: ClassVar[tuple[str, ...]] = ("rotate",)
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program, report: PassReport) -> None:
        roles = Roles(program.graph, self.config)
        for linear in list(linear_likes(program.graph)):
            config = self.config.for_parameter(linear.parameter)
            scheme = config.weight_scheme
            if why := roles.reason_to_keep_precision(linear):
                report.decline(linear.parameter, why)
            elif scheme.bits == UNQUANTIZED_BITS:
                report.decline(linear.parameter, "w_bits=16 asks to leave it alone")
            elif quantized_weight(linear.weight) is None:
                self._quantize(linear, scheme, config.w_rounding)
                report.matched += 1
                report.weights += 1

    def _quantize(self, linear: LinearLike, scheme: QuantScheme, rounding: str) -> None:
        weight, node, dim = linear.weight, linear.node, linear.spelling.contracted
        insert = Inserter(node.graph, self.name, node)
        with node.graph.inserting_before(node):
            packed, scale, zero = insert_packed(insert, weight, scheme, linear.parameter, dim, rounding)
            size = weight.meta["val"].shape[dim]
            codes = insert.call(quarot.unpack.default, packed, scheme.bits, size, scheme.symmetric)
            dense = insert.call(quarot.dequantize.default, codes, scale, zero, weight.meta["val"].dtype)
            dense.meta[ROUNDING] = rounding
            if dim != -1:
                dense = insert.call(aten.transpose.int, dense, dim, -1)
        replace_arguments(node, {linear.spelling.weight: dense})
