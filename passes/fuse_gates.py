"""Two products of one activation, of which one gates the other, become one product that multiplies the two itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import equal_sizes
from quarot_fx.graph import FROZEN, Constants, Inserter, module_path, value
from quarot_fx.linear_like import LAYERS
from quarot_fx.ops.interleave_rows import ROWS
from quarot_fx.passes.activations import activation_of
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.int_linears import ACTIVATION, DTYPE, RESIDUAL, joined, storage
from quarot_fx.passes.matching import before_widening, operands
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class Gated:
    """``activation(gate) * up``, the result of ``node``."""

    node: fx.Node
    gate: fx.Node
    up: fx.Node
    activation: str


@dataclass(frozen=True)
class FuseGates(Pass):
    """``f(int_linear(x, G)) * int_linear(x, U) -> gated_int_linear(x, [G; U], f)``, rows of G and U in turn:
    neither product is stored.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-int-linears",)
    tolerance: ClassVar[float | None] = None  # it computes in float32, and does not round what it multiplies

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for node in program.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            gated = _gated(node)
            if gated is None:
                continue
            if reason := _reason_against(gated, constants):
                report.decline(module_path(node), reason)
            else:
                self._fuse(gated, report)

    def _fuse(self, gated: Gated, report: PassReport) -> None:
        products, insert = (gated.gate, gated.up), Inserter(gated.node.graph, self.name, gated.node)
        dtype = gated.gate.args[DTYPE]
        with insert.graph.inserting_before(gated.node):
            arguments = joined(products, lambda parts: insert.call(quarot.interleave_rows.default, *parts))
            fused = insert_fused(
                insert, self.config, report, quarot.gated_int_linear.default, *arguments, dtype, gated.activation
            )
            if fused is None:
                return
            fused.meta[LAYERS] = tuple(layer for product in products for layer in product.meta[LAYERS])
            is_cast = value(gated.node).dtype != dtype
            result = insert.call(aten.to.dtype, fused, value(gated.node).dtype) if is_cast else fused
        gated.node.replace_all_uses_with(result)


def _gated(node: fx.Node) -> Gated | None:
    """Return what a product of two tensors of one shape is if one gates the other and either is a product of codes."""
    for factor, other in operands(node, aten.mul.Tensor):
        if not equal_sizes(value(factor).shape, value(other).shape):
            return None
        if (found := activation_of(factor)) is None:
            continue
        (activation, gate), up = found, before_widening(other)
        are_two = not _is_made_of(gate, up) and not _is_made_of(up, gate)  # else all is an activation of one of them
        if quarot.int_linear.default in (gate.target, up.target) and are_two:
            return Gated(node, gate, up, activation)
    return None


def _is_made_of(node: fx.Node, source: fx.Node) -> bool:
    pending = [node]
    while pending:
        current = pending.pop()
        if current is source:
            return True
        pending += [earlier for earlier in current.all_input_nodes if not earlier < source]
    return False


def _reason_against(gated: Gated, constants: Constants) -> str | None:
    gate, up = gated.gate, gated.up
    if FROZEN in gated.node.meta:
        return f"the result is changed in place: {gated.node.meta[FROZEN]}"
    for product in (gate, up):
        if product.target is not quarot.int_linear.default:
            return f"{product.target} {product.name} is no product of codes"
        if product.args[RESIDUAL] is not None:
            return f"something is added to {product.name} before"
        if (reader := _reader_besides(gated.node, product)) is not None:
            return f"{product.name} is also read by {reader.target} {reader.name}, and has to be stored for it anyway"
    if gate.args[ACTIVATION] != up.args[ACTIVATION]:
        return "gate and up are products of different activations"
    if storage(gate, constants) != storage(up, constants):
        return "the weights of gate and up are stored in different ways"
    rows = value(gate).shape[-1]
    return f"the kernel takes {ROWS} rows of gate and up in turn, which do not divide {rows}" if rows % ROWS else None


def _reader_besides(node: fx.Node, product: fx.Node) -> fx.Node | None:
    """Return what reads a product other than on the way to a node."""
    pending = list(product.users)
    while pending:
        user = pending.pop()
        if user is not node:
            if user > node:
                return user
            pending += user.users
    return None
