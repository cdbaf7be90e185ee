"""A norm before integer products becomes one op with the quantisation of its result, and with the sum that it reads."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import equal_sizes
from quarot_fx.graph import FROZEN, Constants, Inserter, after, hoist, module_path, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.matching import before_casts, before_views, before_widening, number, operands, replace_operand
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
STREAM = 4  # the place of the sum among norm_quantize's results
PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}


@dataclass(frozen=True)
class Norm:
    """``s / sqrt(mean_square(s) + eps) * gain`` of a tensor x, where s is x, or x less its part along a direction.

    Attributes:
        x: [..., n]; what is computed of it may have been rounded on the way.
        direction: a unit vector [n], or ``None``.
        gain: a vector [n], or ``None``.
        eps: the number, or ``None`` if it is not known.
    """

    x: fx.Node
    direction: fx.Node | None
    gain: fx.Node | None
    eps: float | None


@dataclass(frozen=True)
class FuseNorms(Pass):
    """``quantize(norm(a + b)) -> norm_quantize(a, b)``, which returns the sum too.

    Where others read the norm it stays for them: to read the stream twice costs no more than to write the norm for the
    quantisation and read it again.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-int-linears",)
    tolerance: ClassVar[float | None] = None  # it computes in float32, and does not round what it quantises

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for operand in program.graph.find_nodes(op="call_function", target=quarot.quantize_activation.default):
            source, views = before_views(operand.args[0])
            norm = _norm_of(source, constants)
            if norm is not None and norm.eps is None:
                report.decline(module_path(source), "the norm's eps is not a number")
            elif norm is not None:
                self._fuse(operand, norm, views, report)

    def _fuse(self, operand: fx.Node, norm: Norm, views: tuple[fx.Node, ...], report: PassReport) -> None:
        insert = Inserter(operand.graph, self.name, operand)
        x, addend = _terms(norm.x) or (norm.x, None)
        if addend is not None:  # others may read the sum before it is quantised
            for vector in (norm.direction, norm.gain):
                if vector is not None:
                    hoist(vector, norm.x)
        with insert.graph.inserting_before(operand if addend is None else after(norm.x)):
            fused = insert_fused(
                insert, self.config, report, quarot.norm_quantize.default,
                x, addend, norm.direction, norm.gain, norm.eps, *operand.args[1:],
            )  # fmt: skip
            if fused is not None and addend is not None:
                norm.x.replace_all_uses_with(insert.call(operator.getitem, fused, STREAM))
        if fused is not None:
            with insert.graph.inserting_before(operand):
                replace_operand(insert, operand, fused, views)


def _norm_of(node: fx.Node, constants: Constants) -> Norm | None:
    """Return the norm that a node is the result of."""
    for unit, vector in operands(node, aten.mul.Tensor):
        if vector in constants and equal_sizes(value(vector).shape, value(node).shape[-1:]):
            return _norm_without_gain(before_casts(unit), vector, constants)
    return _norm_without_gain(node, None, constants)


def _norm_without_gain(node: fx.Node, gain: fx.Node | None, constants: Constants) -> Norm | None:
    for vectors, square in _quotients(node):
        if square is None:
            continue
        mean_square = before_casts(square.all_input_nodes[0]) if square.target is aten.add.Tensor else square
        if mean_square.target is not quarot.mean_square.default:
            continue
        x = before_widening(vectors)
        if before_widening(mean_square.all_input_nodes[0]) is not x:
            continue
        eps = 0.0 if square is mean_square else number(square.args[1])
        direction = None
        if x.target is quarot.project_out.default:
            source, direction = x.all_input_nodes
            x = before_widening(source)
        if FROZEN not in x.meta and (direction is None or direction in constants):
            return Norm(x, direction, gain, eps)
    return None


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """Yield x and y if the node is ``x / sqrt(y)`` in some spelling, and x and ``None`` if it is another quotient."""
    if node.target is aten.div.Tensor and len(node.all_input_nodes) == 2:
        x, root = node.all_input_nodes
        yield x, _under_root(root)
    for x, factor in operands(node, aten.mul.Tensor):
        yield x, _under_inverse_root(factor)


def _under_root(root: fx.Node) -> fx.Node | None:
    root = before_casts(root)
    return before_casts(root.all_input_nodes[0]) if root.target is aten.sqrt.default else None


def _under_inverse_root(factor: fx.Node) -> fx.Node | None:
    factor = before_casts(factor)
    if factor.target is aten.reciprocal.default:
        return _under_root(factor.all_input_nodes[0])
    is_power = factor.target is aten.pow.Tensor_Scalar and factor.args[1] == -0.5
    return before_casts(factor.all_input_nodes[0]) if is_power or factor.target is aten.rsqrt.default else None


def _terms(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return what a sum is of if both are in memory: what Inductor can compute on the way to a sum, it adds itself."""
    for a, b in operands(x, aten.add.Tensor):
        vals = [value(one) for one in (x, a, b)]
        are_alike = all(val.dtype == vals[0].dtype and equal_sizes(val.shape, vals[0].shape) for val in vals)
        return (a, b) if are_alike and _is_in_memory(a) and _is_in_memory(b) else None
    return None


def _is_in_memory(node: fx.Node) -> bool:
    """Whether a tensor is stored in any case: several nodes read it, or what makes it is not compiled by Inductor."""
    source, _ = before_views(node)
    maker = source.all_input_nodes[0] if source.target is operator.getitem else source
    namespace, _, name = str(maker.target).partition(".")
    is_external = maker.op != "call_function" or namespace == "quarot" or name.split(".")[0] in PRODUCTS
    return FROZEN not in node.meta and (is_external or len(node.users) > 1)
