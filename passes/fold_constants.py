"""Whatever passes did to weights is computed once, in float64, and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from quarot_fx.float64 import evaluate
from quarot_fx.graph import AUTHOR, Constants, Inserter, parameters_of
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

AT_RUN_TIME = {"quarot.unpack.default", "quarot.dequantize.default"}  # packed codes stay packed


@dataclass(frozen=True)
class FoldConstants(Pass):
    """``f(W) -> W'`` for every expression of parameters that a pass made: float64 inside, rounded once at the end
    (QuaRot, section 4).
    """

    tolerance: ClassVar[float | None] = 0.1  # the one pass that rounds: to bfloat16, if that is what the model has

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        foldable: dict[fx.Node, bool] = {}  # constant node -> one of our passes had a part in it
        for node in program.graph.nodes:
            if node not in constants or str(node.target) in AT_RUN_TIME:
                continue
            if node.op == "get_attr":
                foldable[node] = False
            elif all(source in foldable for source in node.all_input_nodes):
                foldable[node] = AUTHOR in node.meta or any(foldable[source] for source in node.all_input_nodes)
        for node in [node for node, is_ours in foldable.items() if is_ours]:
            if any(not foldable.get(user) for user in node.users):
                self._fold(program, node)
                report.matched += 1
                report.weights += 1

    def _fold(self, program: Program, node: fx.Node) -> None:
        dtype = node.meta["val"].dtype
        value = program.constant(node, f"value as {dtype}", lambda: evaluate(node).to(dtype).contiguous())
        insert = Inserter(node.graph, self.name, node)
        name = parameters_of(node)[0]
        with node.graph.inserting_before(node):
            folded = insert.constant(name, value, name)
        node.replace_all_uses_with(folded)
