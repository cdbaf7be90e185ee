"""Applies the plan: every transform becomes a node, before a weight as before an activation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.basis.plan import Transform
from quarot_fx.errors import PipelineError
from quarot_fx.graph import Inserter, after, argument_nodes, replace_arguments
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

quarot = torch.ops.quarot
BASIS = "quarot_basis"  # node.meta[BASIS]: which of the plan's bases a rotation leads into, or out of


@dataclass(frozen=True)
class Rotate(Pass):
    """``x -> x Q`` wherever the plan's cut runs, and ``x Q -> x`` where the graph had it before and x is in that basis
    now. On constants ``fold-constants`` computes it once, in float64 (QuaRot, section 4, stage 1).
    """

    requires: ClassVar[tuple[str, ...]] = ("place-rotations",)

    def run(self, program: Program, report: PassReport) -> None:
        if program.plan is None:
            raise PipelineError(pipeline=self.name, reason="rotate needs a plan: run place-rotations before it")
        nodes = {node.name: node for node in program.graph.nodes}
        wanted: dict[tuple[str, tuple[str, int]], list[Transform]] = defaultdict(list)
        for transform in program.plan.transforms:
            for use in transform.uses:
                wanted[transform.node, use].append(transform)
        made: dict[tuple[Transform, ...], fx.Node] = {}
        for (name, (user, place)), transforms in wanted.items():
            rotated = self._rotated(nodes[name], tuple(transforms), made)
            replace_arguments(nodes[user], {place: rotated})
        for given in program.plan.given:
            if given.is_identity:
                nodes[given.node].replace_all_uses_with(argument_nodes(nodes[given.node])[0])
        report.matched = len(program.plan.online)
        report.weights = len({t.node for t in program.plan.transforms if not t.online})

    def _rotated(
        self, node: fx.Node, chain: tuple[Transform, ...], made: dict[tuple[Transform, ...], fx.Node]
    ) -> fx.Node:
        """Return a node transformed by each of a chain; uses that want the same share it."""
        if not chain:
            return node
        if chain not in made:
            *before, last = chain
            source = self._rotated(node, tuple(before), made)
            insert = Inserter(node.graph, self.name, node)
            with node.graph.inserting_before(after(source)):
                made[chain] = insert.call(
                    quarot.rotate.default, source, last.rotation, last.dim, last.inner, last.inverse
                )
            made[chain].meta[BASIS] = last.basis
        return made[chain]
