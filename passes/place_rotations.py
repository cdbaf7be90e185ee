"""Decides where rotations go: what is to be quantised wants them, the minimum cut says at which price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from quarot_fx.basis.analysis import Analysis
from quarot_fx.basis.candidates import candidates_of
from quarot_fx.basis.cut import transform_cost
from quarot_fx.basis.outcome import given_of, site_of, transforms_of
from quarot_fx.basis.plan import LEARNED, Basis, RotationPlan
from quarot_fx.basis.solution import solve
from quarot_fx.config import QuarotConfig
from quarot_fx.learning.rotations import known_rotations
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport


@dataclass(frozen=True)
class PlaceRotations(Pass):
    """Finds the cheapest bases by a minimum cut over the axes of the graph, and writes the plan. No node changes."""

    requires: ClassVar[tuple[str, ...]] = ("recognize-norms", "fold-biases", "fold-gains", "fold-means", "balance-keys")

    def run(self, program: Program, report: PassReport) -> None:
        analysis = Analysis(program.graph)
        barriers = Counter(unknown.target for unknown in analysis.unknown)
        for target, count in barriers.items():
            report.decline(target, f"operator {target} has no rule and is a barrier ({count} times)")
        candidates = [] if self.config.rotation == "none" else list(candidates_of(program.graph, analysis, self.config))
        turns = [] if self.config.rotation == "none" else analysis.turns
        solution, left = solve(program.graph, analysis, candidates, turns, self.config)
        bases = tuple(solution.basis(cut, analysis) for cut in solution.joined)
        transforms = [
            transform
            for number, (cut, basis) in enumerate(zip(solution.joined, bases, strict=True))
            for transform in transforms_of(cut, analysis, basis, number)
        ]
        for where in _left(self.config, bases):
            report.decline(where, "the rotation that was learned for it is not used: this graph rotates it otherwise")
        learned = {
            factor
            for cut, basis in zip(solution.joined, bases, strict=True)
            if basis.rotation.startswith(LEARNED)
            for factor in cut.factors
        }
        sites = tuple(site_of(candidate, analysis, solution.cuts, learned) for candidate in candidates)
        for candidate, site in zip(candidates, sites, strict=True):
            report.matched += site.rotated != "no"
            if candidate.worth and site.rotated == "no":
                report.decline(site.name, f"{site.kind} is not rotated: {site.why}")
        given = tuple(given_of(turn, analysis, solution, left.get(turn)) for turn in turns)
        for one in given:
            if not one.is_identity:
                report.decline(one.where, f"a transform of the graph's own stays: {one.why}")
        cost = sum(
            transform_cost(c.position.tensor.numel, cut.size) / 16
            for cut in solution.cuts
            for c in cut.crossings
            if not c.position.tensor.constant
        )
        program.plan = RotationPlan(tuple(transforms), sites, tuple(barriers.items()), cost, given, bases)


def _left(config: QuarotConfig, bases: Iterable[Basis]) -> Iterator[str]:
    """Yield, of learned rotations that a graph does not take, what they were learned for."""
    if config.learned_rotations is None:
        return
    taken = {basis.rotation for basis in bases}
    for one in known_rotations(config.learned_rotations):
        if str(one.rotation) not in taken:
            yield one.absorbed_by[0]
