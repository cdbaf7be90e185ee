"""The quantisation of one token, with the norm before it, becomes part of the product that reads its codes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import Inserter, module_path, value
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.program import Program
from quarot_fx.report import PassReport

quarot = torch.ops.quarot
PRODUCTS = (quarot.int_linear.default, quarot.gated_int_linear.default)
QUANTIZATIONS = (quarot.norm_quantize.default, quarot.quantize_activation.default)


@dataclass(frozen=True)
class FuseDynamicLinears(Pass):
    """``int_linear(norm_quantize(x)) -> dynamic_int_linear(x)`` of one token, whose product is over before a kernel of
    its own would have quantised many. Of more tokens it pays to quantise each once.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-gates", "merge-int-linears", "fuse-norms", "fuse-rotations")
    tolerance: ClassVar[float | None] = None  # sums of squares run in another order

    def run(self, program: Program, report: PassReport) -> None:
        for target in PRODUCTS:
            for product in program.graph.find_nodes(op="call_function", target=target):
                codes: Any = argument(product, "codes")
                quantized = codes.all_input_nodes[0] if codes.target is operator.getitem else codes
                if quantized.target not in QUANTIZATIONS:
                    continue
                if reason := _reason_against(product, quantized):
                    report.decline(module_path(product), reason)
                else:
                    self._fuse(product, quantized, report)

    def _fuse(self, product: fx.Node, quantized: fx.Node, report: PassReport) -> None:
        is_norm, is_gated = quantized.target is QUANTIZATIONS[0], product.target is PRODUCTS[1]
        gain, eps = (argument(quantized, name) if is_norm else None for name in ("gain", "eps"))
        weight = (argument(product, name) for name in ("weight", "weight_scale", "weight_bits", "bias"))
        residual = None if is_gated else argument(product, "residual")
        insert = Inserter(product.graph, self.name, product)
        with product.graph.inserting_before(product):
            fused = insert_fused(
                insert, self.config, report, quarot.dynamic_int_linear.default,
                argument(quantized, "x"), gain, eps, argument(quantized, "bits"), argument(quantized, "clip"), *weight,
                residual, argument(product, "dtype"), argument(product, "activation") if is_gated else None,
            )  # fmt: skip
        if fused is not None:
            fused.meta[LAYERS] = product.meta[LAYERS]
            product.replace_all_uses_with(fused)


def _reason_against(product: fx.Node, quantized: fx.Node) -> str | None:
    x = value(argument(quantized, "x"))
    if not all(isinstance(size, int) and size == 1 for size in x.shape[:-1]):
        return f"an activation {tuple(x.shape)} is more than one token, or not known to be one"
    if argument(quantized, "container") != torch.int8 or not argument(quantized, "symmetric"):
        return "codes are in another type than int8, or have zero points"
    if any(argument(product, name) is not None for name in ("weight_zero", "weight_sum")):
        return "the weight has zero points"
    if any(value(argument(product, name)).shape[-1] > 1 for name in ("scale", "weight_scale")):
        return "a scale is of a group"
    is_norm = quantized.target is QUANTIZATIONS[0]
    if is_norm and any(argument(quantized, name) is not None for name in ("addend", "direction")):
        return "the norm adds to the stream, or takes a direction out of it"
    others = {user for part in quantized.users for user in part.users} - {product}
    if others:
        return f"the same codes are read by {', '.join(sorted(other.name for other in others))}"
    return None
