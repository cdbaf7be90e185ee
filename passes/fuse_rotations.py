"""A rotation before integer products becomes one op with the quantisation after it and the activation before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument, equal_sizes
from quarot_fx.graph import Inserter, module_path, value
from quarot_fx.passes.activations import activation_of
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.matching import before_views, before_widening, operands, replace_operand
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class Activated:
    """``activation(gate) * x``, or ``activation(x)`` without a gate, with its rows arranged by views."""

    x: fx.Node
    gate: fx.Node | None = None
    activation: str = "identity"
    views: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class FuseRotations(Pass):
    """``quantize(rotate(f(gate) * x)) -> rotate_quantize(x, gate, f)``, and likewise for ``f(x)`` or x itself."""

    requires: ClassVar[tuple[str, ...]] = ("fuse-int-linears",)
    tolerance: ClassVar[float | None] = None  # it computes in float32, and does not round what it quantises

    def run(self, program: Program, report: PassReport) -> None:
        for operand in program.graph.find_nodes(op="call_function", target=quarot.quantize_activation.default):
            rotate, views = before_views(operand.args[0])
            if rotate.target is not quarot.rotate.default:
                continue
            if reason := _reason_against(rotate):
                report.decline(module_path(rotate), reason)
                continue
            activated, insert = _activated(rotate), Inserter(program.graph, self.name, operand)
            with program.graph.inserting_before(operand):
                fused = insert_fused(
                    insert, self.config, report, quarot.rotate_quantize.default,
                    activated.x, activated.gate, activated.activation,
                    argument(rotate, "rotation"), argument(rotate, "inner"), *operand.args[1:],
                )  # fmt: skip
                if fused is not None:
                    replace_operand(insert, operand, fused, (*activated.views, *views))


def _reason_against(rotate: fx.Node) -> str | None:
    ndim, dim = value(rotate).ndim, argument(rotate, "dim")
    if dim % ndim != ndim - 1:
        return f"axis {dim} of {ndim} is rotated, and codes share a scale along the last one"
    if argument(rotate, "inverse"):
        return "a rotation is undone, and the kernel only rotates"
    pending = list(rotate.users)
    while pending:
        user = pending.pop()
        if before_views(user)[0] is rotate:
            pending += user.users
        elif user.target is not quarot.quantize_activation.default:
            return f"it is also read by {user.target} {user.name}, and has to be computed for it anyway"
    return None


def _activated(rotate: fx.Node) -> Activated:
    """Return what a rotation is of; the activation is left to others where they read it too."""
    x = rotate.all_input_nodes[0]
    source, views = before_views(x)
    if not _is_read_only_by(source, rotate):
        return Activated(x)
    if (found := activation_of(source)) is not None:
        name, argument_of = found
        return Activated(argument_of, None, name, views)
    for factor, other in operands(source, aten.mul.Tensor):
        if (found := activation_of(factor)) is not None:
            name, gate = found
            multiplied = before_widening(other)
            if equal_sizes(value(gate).shape, value(multiplied).shape):
                return Activated(multiplied, gate, name, views)
    return Activated(x)


def _is_read_only_by(node: fx.Node, reader: fx.Node) -> bool:
    while node is not reader and len(node.users) == 1:
        node = next(iter(node.users))
    return node is reader
