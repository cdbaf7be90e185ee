"""Products of one activation become one product: queries, keys and values, or gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from quarot_fx.graph import PART, Constants, Inserter, hoist, module_path
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
ACTIVATION = slice(0, 4)  # int_linear's arguments: codes, scale, zero, sum
WEIGHT = slice(4, 8)  # codes, scale, zero, sum
BITS, BIAS, RESIDUAL, DTYPE = range(8, 12)


@dataclass(frozen=True)
class MergeIntLinears(Pass):
    """``[int_linear(x, W1), int_linear(x, W2)] -> split(int_linear(x, [W1; W2]))``: a launch for each activation, and
    more rows for each launch.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-int-linears",)

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        of_activation: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for node in program.graph.find_nodes(op="call_function", target=quarot.int_linear.default):
            of_activation[node.args[ACTIVATION]].append(node)
        for nodes in of_activation.values():
            alike: dict[Hashable, list[fx.Node]] = defaultdict(list)
            for node in nodes:
                alike[_storage(node, constants)].append(node)
            for same in alike.values():
                if len(same) > 1:
                    self._merge(same)
                    report.matched += 1
                elif len(nodes) > 1:
                    report.decline(module_path(same[0]), "no other weight of its activation is stored as its own")

    def _merge(self, nodes: list[fx.Node]) -> None:
        first = nodes[0]
        insert = Inserter(first.graph, self.name, first)

        def stacked(place: int) -> fx.Node | None:
            parts: list[Any] = [node.args[place] for node in nodes]
            if parts[0] is None:
                return None
            for part in parts:
                hoist(part, first)
            whole = insert.call(aten.cat.default, parts, 0)
            whole.meta[PART] = parts[0].meta.get(PART, "bias")
            return whole

        with first.graph.inserting_before(first):
            weight = [stacked(place) for place in range(*WEIGHT.indices(len(first.args)))]
            rest = (first.args[BITS], stacked(BIAS), None, first.args[DTYPE])
            merged = insert.call(quarot.int_linear.default, *first.args[ACTIVATION], *weight, *rest)
            merged.meta[LAYERS] = tuple(layer for node in nodes for layer in node.meta[LAYERS])
            start = 0
            for node in nodes:
                end = start + node.meta["val"].shape[-1]
                node.replace_all_uses_with(insert.call(aten.slice.Tensor, merged, -1, start, end))
                start = end


def _storage(node: fx.Node, constants: Constants) -> Hashable:
    """Return what is equal for products that can be one; a product that cannot be merged is equal to itself only."""
    parts: tuple[Any, ...] = (*node.args[WEIGHT], node.args[BIAS])
    if node.args[RESIDUAL] is not None or any(part is not None and part not in constants for part in parts):
        return node
    groups = parts[1].meta["val"].shape[-1]
    return groups, tuple(part is None for part in parts), node.args[BITS], node.args[DTYPE]
