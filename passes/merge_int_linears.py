"""Products of one activation become one product: queries, keys and values, or gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.graph import Constants, Inserter, hoist, module_path
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.base import Pass
from quarot_fx.passes.int_linears import ACTIVATION, DTYPE, joined, storage
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class MergeIntLinears(Pass):
    """``[int_linear(x, W1), int_linear(x, W2)] -> split(int_linear(x, [W1; W2]))``: a launch for each activation, and
    more rows for each launch.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-int-linears", "fuse-gates")

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        of_activation: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for node in program.graph.find_nodes(op="call_function", target=quarot.int_linear.default):
            of_activation[node.args[ACTIVATION]].append(node)
        for nodes in of_activation.values():
            alike: dict[Hashable, list[fx.Node]] = defaultdict(list)
            for node in nodes:
                alike[storage(node, constants)].append(node)
            for same in alike.values():
                if len(same) > 1:
                    self._merge(same)
                    report.matched += 1
                elif len(nodes) > 1:
                    report.decline(module_path(same[0]), "no other weight of its activation is stored as its own")

    def _merge(self, nodes: list[fx.Node]) -> None:
        first = nodes[0]
        insert = Inserter(first.graph, self.name, first)

        def stacked(parts: list[fx.Node]) -> fx.Node:
            for part in parts:
                hoist(part, first)
            return insert.call(aten.cat.default, parts, 0)

        with first.graph.inserting_before(first):
            arguments = joined(nodes, stacked)
            merged = insert.call(quarot.int_linear.default, *arguments, None, first.args[DTYPE])
            merged.meta[LAYERS] = tuple(layer for node in nodes for layer in node.meta[LAYERS])
            start = 0
            for node in nodes:
                end = start + node.meta["val"].shape[-1]
                node.replace_all_uses_with(insert.call(aten.slice.Tensor, merged, -1, start, end))
                start = end
