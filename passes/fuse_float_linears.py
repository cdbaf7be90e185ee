"""A product of a few tokens with a large weight left in 16 bits, an output head above all, gets a kernel of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quarot_fx.config import UNQUANTIZED_BITS
from quarot_fx.graph import Inserter, module_path, value
from quarot_fx.linear_like import LAYERS, Layer, LinearLike, linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.matching import reason_against_tokens
from quarot_fx.passes.quantized import quantized_activation, quantized_weight
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles

aten, quarot = torch.ops.aten, torch.ops.quarot
MOST_TOKENS = 16  # of more, products are bound by the tensor cores, too
FEWEST_WEIGHTS = 1 << 24  # of smaller ones, the time is that of a launch, and the compiler of the rest has the choice


@dataclass(frozen=True)
class FuseFloatLinears(Pass):
    """``linear(x, weight) -> float_linear(x, weight)`` of a few tokens, which takes as long as the weight's bytes."""

    requires: ClassVar[tuple[str, ...]] = ("fuse-int-linears",)
    tolerance: ClassVar[float | None] = None  # sums run in another order

    def run(self, program: Program, report: PassReport) -> None:
        roles = Roles(program.graph, self.config)
        for linear in list(linear_likes(program.graph)):
            if _is_large_and_float(linear):
                if reason := reason_against_tokens(linear.x, MOST_TOKENS):
                    report.decline(module_path(linear.node), reason)
                else:
                    self._fuse(linear, roles.role(linear), report)

    def _fuse(self, linear: LinearLike, role: str, report: PassReport) -> None:
        node, insert = linear.node, Inserter(linear.node.graph, self.name, linear.node)
        with node.graph.inserting_before(node):
            op = quarot.float_linear.default
            fused = insert_fused(insert, self.config, report, op, linear.x, linear.weight, linear.bias)
        if fused is not None:
            bits = UNQUANTIZED_BITS
            fused.meta[LAYERS] = (Layer(node.name, linear.parameter, bits, bits, role, "", None),)
            node.replace_all_uses_with(fused)


def _is_large_and_float(linear: LinearLike) -> bool:
    if linear.node.target is not aten.linear.default or value(linear.weight).numel() < FEWEST_WEIGHTS:
        return False
    return quantized_weight(linear.weight) is None and quantized_activation(linear.x) is None
