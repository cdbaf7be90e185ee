"""Whatever passes did to weights is computed once, in float64, and stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.float64 import evaluate
from quarot_fx.graph import AUTHOR, PART, Constants, Inserter, is_tensor, parameters_of, stored_tensor, with_sources
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.store import expression

AT_RUN_TIME = {"quarot.unpack.default", "quarot.dequantize.default"}  # packed codes stay packed


@dataclass(frozen=True)
class FoldConstants(Pass):
    """``f(W) -> W'`` for every expression of parameters that a pass made: float64 inside, rounded once at the end
    (QuaRot, section 4).
    """

    tolerance: ClassVar[float | None] = 0.1  # the one pass that rounds: to bfloat16, if that is what the model has

    def run(self, program: Program, report: PassReport) -> None:
        folded = constants_to_fold(program.graph)
        quantizations = {node: _quantizations_behind(node) for node in folded}
        pending = Counter(node for nodes in quantizations.values() for node in nodes)
        leaves = {node: expression(node).leaves for node in folded}
        readers = Counter(id(leaf) for of_node in leaves.values() for leaf in of_node)
        live = {id(stored_tensor(node)) for node in read_as_they_are(program.graph, folded)}
        for node in folded:
            self._fold(program, node)
            report.matched += 1
            report.weights += 1
            readers.subtract(id(leaf) for leaf in leaves[node])
            program.release([leaf for leaf in leaves[node] if not readers[id(leaf)] and id(leaf) not in live])
            pending -= Counter(quantizations[node])
            for done in quantizations[node] - pending.keys():
                program.known.pop(done, None)

    def _fold(self, program: Program, node: fx.Node) -> None:
        value = folded_value(program, node)
        insert = Inserter(node.graph, self.name, node)
        name = parameters_of(node)[0]
        with node.graph.inserting_before(node):
            folded = insert.constant(f"{name}.{node.meta[PART]}" if PART in node.meta else name, value, name)
        node.replace_all_uses_with(folded)


def constants_to_fold(graph: fx.Graph) -> list[fx.Node]:
    """Return the constants that a pass had a part in and that are read by something not folded with them, in order."""
    constants = Constants(graph)
    foldable: dict[fx.Node, bool] = {}  # constant node -> one of our passes had a part in it
    for node in graph.nodes:
        if node not in constants or str(node.target) in AT_RUN_TIME:
            continue
        if node.op == "get_attr":
            foldable[node] = False
        elif all(source in foldable for source in node.all_input_nodes):
            foldable[node] = AUTHOR in node.meta or any(foldable[source] for source in node.all_input_nodes)
    return [n for n, is_ours in foldable.items() if is_ours and any(not foldable.get(user) for user in n.users)]


def read_as_they_are(graph: fx.Graph, folded: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the stored tensors that are read, or written, by anything but constants that are folded."""
    outputs = [node for node in graph.nodes if node.op == "output" or node.is_impure()]
    found = with_sources(*outputs, without=set(folded))
    return [node for node in found if node.op == "get_attr" and is_tensor(node)]


def folded_value(program: Program, node: fx.Node) -> torch.Tensor:
    """Return what a constant is stored as: its value in float64, rounded to its dtype, contiguous."""
    dtype = node.meta["val"].dtype
    return program.constant(node, f"value as {dtype}", lambda: evaluate(node, program.known, dtype).contiguous())


def _quantizations_behind(node: fx.Node) -> set[fx.Node]:
    """Return the quantisations of weights that a constant is made of."""
    return {source for source in with_sources(node) if source.target is torch.ops.quarot.quantize_weight.default}
