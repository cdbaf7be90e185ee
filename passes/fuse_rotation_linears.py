"""A rotation of one token across its heads, and the quantisation after it, become part of the product that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import Inserter, module_path
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.one_token import products_of, reason_against_one_token
from quarot_fx.program import Program
from quarot_fx.report import PassReport

quarot = torch.ops.quarot


@dataclass(frozen=True)
class FuseRotationLinears(Pass):
    """``int_linear(rotate_quantize(x)) -> rotate_int_linear(x)`` of one token, which all programs of the product
    rotate for themselves where that is cheap, across heads: a launch costs more.
    """

    requires: ClassVar[tuple[str, ...]] = ("merge-int-linears", "fuse-rotations")
    tolerance: ClassVar[float | None] = None  # a provider may round elsewhere

    def run(self, program: Program, report: PassReport) -> None:
        for product, rotate in products_of(program, quarot.rotate_quantize.default, quarot.int_linear.default):
            if reason := _reason_against(product, rotate):
                report.decline(module_path(product), reason)
            else:
                self._fuse(product, rotate, report)

    def _fuse(self, product: fx.Node, rotate: fx.Node, report: PassReport) -> None:
        insert = Inserter(product.graph, self.name, product)
        with product.graph.inserting_before(product):
            fused = insert_fused(
                insert, self.config, report, quarot.rotate_int_linear.default,
                *(argument(rotate, name) for name in ("x", "rotation", "inner", "bits", "clip")),
                *(argument(product, name) for name in ("weight", "weight_scale", "bias", "residual", "dtype")),
            )  # fmt: skip
        if fused is not None:
            fused.meta[LAYERS] = product.meta[LAYERS]
            product.replace_all_uses_with(fused)


def _reason_against(product: fx.Node, rotate: fx.Node) -> str | None:
    if reason := reason_against_one_token(product, rotate):
        return reason
    if argument(rotate, "gate") is not None or argument(rotate, "activation") != "identity":
        return "what is rotated is gated, or an activation's result"
    if argument(rotate, "inner") == 1:
        return "whole rows or heads are rotated, and not across heads: each program would take too long"
    return None
