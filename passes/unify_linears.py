"""Products with a weight matrix, however they are written, become ``linear``: what follows knows one spelling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from quarot_fx.graph import Constants, Inserter, argument_nodes, is_float, is_tensor
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
PRODUCTS = {"aten.matmul.default", "aten.mm.default"}
TRANSPOSITIONS = {"aten.t.default", "aten.numpy_T.default", "aten.mT.default"}


@dataclass(frozen=True)
class UnifyLinears(Pass):
    """``x @ W + b -> linear(x, W^T, b)`` and ``W @ x -> linear(x^T, W)^T``, where ``W`` is a constant matrix. Stacks of
    matrices stay products.
    """

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for node in list(program.graph.nodes):
            operands = _operands(node)
            if operands is None:
                continue
            x, weight, bias = operands
            is_left = bias is None and x in constants
            if is_left:
                x, weight = weight, x
            if x in constants or weight not in constants or not is_float(weight) or weight.meta["val"].ndim != 2:
                continue
            insert = Inserter(program.graph, self.name, node)
            with program.graph.inserting_before(node):
                if is_left:
                    linear = _on_the_left(weight, x, insert)
                else:
                    linear = insert.call(aten.linear.default, x, _transposed(weight, insert), bias)
            node.replace_all_uses_with(linear)
            report.matched += 1


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return activation, weight ``[in, out]`` and bias ``[out]`` of a product with a vector or matrix on the left."""
    operands = argument_nodes(node)
    if not all(map(is_tensor, (node, *operands))):
        return None
    if str(node.target) in PRODUCTS:
        x, weight = operands
        return x, weight, None
    if str(node.target) == "aten.addmm.default" and not node.kwargs:  # no beta, no alpha
        bias, x, weight = operands
        return (x, weight, bias) if bias.meta["val"].shape == weight.meta["val"].shape[1:] else None
    return None


def _on_the_left(weight: fx.Node, x: fx.Node, insert: Inserter) -> fx.Node:
    """Return ``W @ x`` for W [out, in], and x [in] or [..., in, columns]."""
    if x.meta["val"].ndim == 1:
        return insert.call(aten.linear.default, x, weight)
    rows = argument_nodes(x)[0] if _swaps_last_axes(x) else insert.call(aten.transpose.int, x, -1, -2)
    return insert.call(aten.transpose.int, insert.call(aten.linear.default, rows, weight), -1, -2)


def _swaps_last_axes(node: fx.Node) -> bool:
    ndim = node.meta["val"].ndim
    dims = {int(dim) % ndim for dim in node.args[1:]} if str(node.target) == "aten.transpose.int" else set()  # type: ignore[arg-type]
    return dims == {ndim - 1, ndim - 2}


def _transposed(weight: fx.Node, insert: Inserter) -> fx.Node:
    """Return ``weight`` transposed: what it is the transpose of, if it is one."""
    if _is_transposition(weight):
        return argument_nodes(weight)[0]
    return insert.call(aten.t.default, weight)


def _is_transposition(node: fx.Node) -> bool:
    if str(node.target) == "aten.transpose.int":
        return {int(dim) % 2 for dim in node.args[1:]} == {0, 1}  # type: ignore[arg-type]
    if str(node.target) == "aten.permute.default":
        return [dim % 2 for dim in node.args[1]] == [1, 0]  # type: ignore[union-attr, operator]
    return str(node.target) in TRANSPOSITIONS
