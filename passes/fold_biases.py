"""Vectors added before linear layers, such as a LayerNorm's bias, move into the layers' own biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.graph import Inserter, argument_nodes, is_tensor, module_path
from quarot_fx.linear_like import LinearLike
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fold_gains import gain_of, stand_in
from quarot_fx.passes.readers import Blocked, Readers
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
HAS_BIAS = {"aten.linear.default", "aten.addmm.default"}


@dataclass(frozen=True)
class FoldBiases(Pass):
    """``W (x + b) + c = W x + (W b + c)`` where linear layers alone read the sum (QuaRot, section 3.1)."""

    requires: ClassVar[tuple[str, ...]] = ("recognize-norms",)

    def run(self, program: Program, report: PassReport) -> None:
        readers = Readers(program.graph)
        for node in reversed(program.graph.nodes):  # so that of sums in a row the last makes way for the first
            bias = gain_of(node, readers.constants) if str(node.target) == "aten.add.Tensor" else None
            if bias is None or node.kwargs.get("alpha", 1) != 1:
                continue
            into = readers.of(node)
            if isinstance(into, Blocked):
                report.decline(module_path(node), f"a bias stays: {into.reason}")
                continue
            unable = [linear for linear in into if not can_add_bias(linear)]
            if unable:
                report.decline(module_path(node), f"a bias stays: {unable[0].node.target} cannot add one")
                continue
            for linear in into:
                add_bias(linear, bias, self.name)
                report.weights += 1
            stand_in(node, next(operand for operand in argument_nodes(node) if operand is not bias), self.name)
            report.matched += 1


def can_add_bias(linear: LinearLike) -> bool:
    """Whether a layer's operator adds a vector to the product: ``addmm`` may add a matrix, and scale both."""
    is_plain = all(scale == 1 for scale in linear.node.kwargs.values())
    return str(linear.node.target) in HAS_BIAS and is_plain and linear.adds_at_most_a_vector


def add_bias(linear: LinearLike, shift: fx.Node, author: str) -> None:
    """Give a linear layer the bias ``W shift + c``, what it would add if its input were shifted."""
    node, weight, bias = linear.node, linear.weight, linear.bias
    insert = Inserter(node.graph, author, node)
    dtype = weight.meta["val"].dtype
    with node.graph.inserting_before(node):
        row = insert.call(aten.to.dtype, insert.call(aten.reshape.default, shift, [-1]), dtype)
        matrix = weight if linear.spelling.contracted == -1 else insert.call(aten.t.default, weight)
        moved = insert.call(aten.linear.default, row, matrix, *([bias] if is_tensor(bias) else []))
    if str(node.target) == "aten.linear.default":
        node.args = (node.args[0], node.args[1], moved)
        node.kwargs = {}
    else:
        node.args = (moved, *node.args[1:])
