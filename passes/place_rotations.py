"""Decides where rotations go: what is to be quantised wants them, the minimum cut says at which price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from quarot_fx.attention import reads_of_keys_and_values
from quarot_fx.basis.analysis import Analysis, Position
from quarot_fx.basis.cut import IF_FREE, NOTHING, REQUIRED, FactorCut, Want, cheapest_bases, transform_cost
from quarot_fx.basis.joining import join_adjacent
from quarot_fx.basis.operator import Axis, Tensor
from quarot_fx.basis.plan import RotationPlan, Site, Transform
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.graph import module_path
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles
from quarot_fx.rotation import Rotation

VIEWS = ("view", "reshape", "expand", "transpose", "unsqueeze", "permute", "contiguous", "clone", "flatten",
         "repeat_interleave")  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An axis that is to be rotated, and how much that is worth."""

    kind: str
    node: fx.Node
    name: str
    axis: Axis
    worth: int


@dataclass(frozen=True)
class PlaceRotations(Pass):
    """Finds the cheapest bases by a minimum cut over the axes of the graph, and writes the plan. No node changes."""

    requires: ClassVar[tuple[str, ...]] = ("recognize-norms", "fold-biases", "fold-gains", "fold-means")

    def run(self, program: Program, report: PassReport) -> None:
        analysis = Analysis(program.graph)
        barriers = Counter(unknown.target for unknown in analysis.unknown)
        for target, count in barriers.items():
            report.decline(target, f"operator {target} has no rule and is a barrier ({count} times)")
        candidates = [] if self.config.rotation == "none" else list(_candidates(program.graph, analysis, self.config))
        wants = [
            Want(position, candidate.worth)
            for candidate in candidates
            if candidate.worth
            for _, position in analysis.positions(candidate.axis)
        ]
        heads = {factor for c in candidates if c.kind != "linear" for factor, _ in analysis.positions(c.axis)}
        cuts = cheapest_bases(analysis, [*wants, *_wants_of_writers(program.graph, analysis, heads)])
        transforms = [
            transform
            for cut in join_adjacent(cuts)
            for transform in _transforms(cut, analysis, _rotation(cut, cut.factor in heads, self.config))
        ]
        sites = tuple(_site(candidate, analysis, cuts) for candidate in candidates)
        for candidate, site in zip(candidates, sites, strict=True):
            report.matched += site.rotated != "no"
            if candidate.worth and site.rotated == "no":
                report.decline(site.name, f"{site.kind} is not rotated: {site.why}")
        cost = sum(
            transform_cost(c.position.tensor.numel, cut.size) / 16
            for cut in cuts
            for c in cut.crossings
            if not c.position.tensor.constant
        )
        program.plan = RotationPlan(tuple(transforms), sites, tuple(barriers.items()), cost)


def _candidates(graph: fx.Graph, analysis: Analysis, config: QuarotConfig) -> Iterator[Candidate]:
    """Yield what wants rotating. A config that quantises nothing is planned as if it quantised everything, since
    what it can only be for is to see the rotations at work.
    """
    quantizes = any(getattr(config, name) != UNQUANTIZED_BITS for name in ("w_bits", "a_bits", "k_bits", "v_bits"))
    wanted = config if quantizes else replace(config, w_bits=4, a_bits=4, kv_bits=4)
    roles = Roles(graph, wanted)
    for linear in linear_likes(graph):
        bits = wanted.for_parameter(linear.parameter)
        worth = REQUIRED
        if roles.reason_to_keep_precision(linear) or bits.w_bits == bits.a_bits == UNQUANTIZED_BITS:
            worth = NOTHING
        elif bits.a_bits == UNQUANTIZED_BITS:
            worth = IF_FREE
        use = analysis.uses[linear.node, linear.spelling.x]
        yield Candidate("linear", linear.node, linear.parameter, use.axis(-1), worth)
    for read in reads_of_keys_and_values(graph):
        axis = analysis.uses[read.user, read.place].axis(read.dim)
        if (wanted.k_bits if read.kind == "key" else wanted.v_bits) != UNQUANTIZED_BITS:
            yield Candidate(read.kind, read.user, module_path(read.user), axis, REQUIRED)
        elif read.kind == "value":  # graphs with a cache and without one must agree on the weight that writes it
            analysis.pin(axis, "values of 16 bits are kept as a cache of the caller's holds them")


def _wants_of_writers(graph: fx.Graph, analysis: Analysis, heads: set[int]) -> Iterator[Want]:
    """Yield wants of the linear layers that write keys and values, to be rotated wherever attention can be.

    Without a cache that costs nothing. A cache of the caller's pins what enters it, and one small transform of the new
    tokens is the price for the same rounded weights in all graphs of a model, with a cache and without one.
    """
    for linear in linear_likes(graph):
        for factor, position in analysis.positions(analysis.results[linear.node][0].axis(-1)):
            if factor in heads:
                yield Want(position, REQUIRED)


def _rotation(cut: FactorCut, is_head_dim: bool, config: QuarotConfig) -> Rotation:
    """Random where weights alone pay for it; online a plain Hadamard, which needs no signs.

    Keys and values get a plain one always: whether it is online depends on the cache, and a model's graphs with and
    without one must agree on its weights.
    """
    if cut.is_online or is_head_dim:
        return Rotation("hadamard", cut.size)
    kind = "random" if config.rotation == "random" else "random-hadamard"
    return Rotation(kind, cut.size, config.seed)


def _transforms(cut: FactorCut, analysis: Analysis, rotation: Rotation) -> Iterator[Transform]:
    for crossing in cut.crossings:
        tensor, dim, _ = crossing.position
        uses = [use.tensor for use in crossing.uses]
        yield Transform(
            node=tensor.node.name,
            dim=dim,
            inner=_inner(analysis, crossing.position),
            rotation=str(rotation),
            inverse=crossing.inverse,
            uses=tuple((_user(use).name, use.index) for use in uses),
            online=not tensor.constant,
            shape=tuple(size if isinstance(size, int) else str(size) for size in tensor.shape),
            where=module_path(_user(uses[0])),
            why=crossing.why,
        )


def _user(use: Tensor) -> fx.Node:
    assert use.user is not None
    return use.user


def _inner(analysis: Analysis, position: Position) -> int:
    tensor, dim, place = position
    inner = 1
    for leaf in analysis.leaves(tensor.axis(dim))[place + 1 :]:
        inner *= analysis.factors.size(leaf)
    return inner


def _site(candidate: Candidate, analysis: Analysis, cuts: list[FactorCut]) -> Site:
    """Say how one candidate ended: which of its factors are rotated, and whether a transform stands before it."""
    by_factor = {cut.factor: cut for cut in cuts}
    pairs = [(by_factor.get(factor), position) for factor, position in analysis.positions(candidate.axis)]
    rotated = [cut is not None and position in cut.rotated for cut, position in pairs]
    unmet = [cut.unmet[position] for cut, position in pairs if cut is not None and position in cut.unmet]
    online = [
        crossing.why
        for cut, position in pairs
        if cut is not None
        for crossing in cut.crossings
        if not crossing.position.tensor.constant and not crossing.inverse and _feeds(crossing.position, position)
    ]
    if not any(rotated):
        default = "nothing asks for it" if candidate.worth == NOTHING else "its size is not known, or is 1"
        kind, why = "no", next(iter(unmet), default)
    elif not all(rotated):
        kind, why = "partly", next(iter(unmet), "")
    else:
        kind, why = ("online", online[0]) if online else ("free", "")
    return Site(candidate.kind, candidate.node.name, candidate.name, kind, why)


def _feeds(source: Position, sink: Position) -> bool:
    """Whether a transformed tensor reaches a use through repetition of heads and views only."""
    node = sink.tensor.node
    while node is not source.tensor.node:
        if not any(f"aten.{view}." in str(node.target) for view in VIEWS):
            return False
        node = node.all_input_nodes[0]
    return True
