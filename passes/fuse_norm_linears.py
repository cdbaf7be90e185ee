"""A norm of one token, and the quantisation of its result, become part of the product that reads the codes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import Inserter, module_path, value
from quarot_fx.linear_like import LAYERS
from quarot_fx.ops.norm_int_linear import WEIGHT_BITS
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.matching import reason_against_tokens
from quarot_fx.program import Program
from quarot_fx.report import PassReport

quarot = torch.ops.quarot


@dataclass(frozen=True)
class FuseNormLinears(Pass):
    """``int_linear(norm_quantize(x)) -> norm_int_linear(x)`` of one token, which all programs of the product
    quantise for themselves: a launch costs more. Of more tokens it pays to quantise each once.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-gates", "merge-int-linears", "fuse-norms")
    tolerance: ClassVar[float | None] = None  # sums of squares run in another order

    def run(self, program: Program, report: PassReport) -> None:
        for product, norm in _products_of_norms(program.graph):
            if reason := _reason_against(product, norm):
                report.decline(module_path(product), reason)
            else:
                self._fuse(product, norm, report)

    def _fuse(self, product: fx.Node, norm: fx.Node, report: PassReport) -> None:
        is_gated = product.target is quarot.gated_int_linear.default
        insert = Inserter(product.graph, self.name, product)
        with product.graph.inserting_before(product):
            fused = insert_fused(
                insert, self.config, report, quarot.norm_int_linear.default,
                *(argument(norm, name) for name in ("x", "gain", "eps", "bits", "clip")),
                *(argument(product, name) for name in ("weight", "weight_scale", "bias")),
                None if is_gated else argument(product, "residual"), argument(product, "dtype"),
                argument(product, "activation") if is_gated else None,
            )  # fmt: skip
        if fused is not None:
            fused.meta[LAYERS] = product.meta[LAYERS]
            product.replace_all_uses_with(fused)


def _products_of_norms(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield each product of codes that a norm's op made, and that op's node."""
    for target in (quarot.int_linear.default, quarot.gated_int_linear.default):
        for product in graph.find_nodes(op="call_function", target=target):
            codes: Any = argument(product, "codes")
            source = codes.all_input_nodes[0] if codes.target is operator.getitem else codes
            if source.target is quarot.norm_quantize.default:
                yield product, source


def _reason_against(product: fx.Node, norm: fx.Node) -> str | None:
    if reason := reason_against_tokens(argument(norm, "x"), 1):
        return reason
    if any(argument(norm, name) is not None for name in ("addend", "direction")):
        return "the norm adds to the stream, or takes a direction out of it"
    if argument(norm, "container") != torch.int8 or not argument(norm, "symmetric"):
        return "codes are in another type than int8, or have zero points"
    if any(argument(product, name) is not None for name in ("weight_zero", "weight_sum")):
        return "the weight has zero points"
    if any(value(argument(product, name)).shape[-1] > 1 for name in ("scale", "weight_scale")):
        return "a scale is of a group"
    if argument(product, "weight_bits") != WEIGHT_BITS:
        return f"the weight has {argument(product, 'weight_bits')} bits, and the kernel takes {WEIGHT_BITS}"
    others = {user for part in norm.users for user in part.users} - {product}
    if others:
        return f"the same codes are read by {', '.join(sorted(other.name for other in others))}"
    return None
