"""What became of a graph's axes, as the plan tells it: transforms, sites, and the transforms that it had before."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from quarot_fx.basis.analysis import Analysis, Position
from quarot_fx.basis.candidates import Candidate
from quarot_fx.basis.cut import NOTHING, FactorCut
from quarot_fx.basis.operator import Tensor, Turn
from quarot_fx.basis.plan import Basis, Given, Site, Transform
from quarot_fx.basis.solution import Solution, inner_size
from quarot_fx.graph import main_parameter_of, module_path

VIEWS = ("view", "reshape", "expand", "transpose", "unsqueeze", "permute", "contiguous", "clone", "flatten",
         "repeat_interleave")  # fmt: skip


def transforms_of(cut: FactorCut, analysis: Analysis, basis: Basis, number: int) -> Iterator[Transform]:
    """Yield the transforms that stand where a cut runs, each into a basis or out of it."""
    for crossing in cut.crossings:
        tensor, dim, _ = crossing.position
        uses = [use.tensor for use in crossing.uses]
        yield Transform(
            node=tensor.node.name,
            dim=dim,
            inner=inner_size(analysis, crossing.position),
            rotation=basis.rotation,
            inverse=crossing.inverse,
            uses=tuple((_user(use).name, use.index) for use in uses),
            online=not tensor.constant,
            shape=tuple(size if isinstance(size, int) else str(size) for size in tensor.shape),
            where=module_path(_user(uses[0])),
            why=crossing.why,
            basis=number,
        )


def _user(use: Tensor) -> fx.Node:
    assert use.user is not None
    return use.user


def site_of(candidate: Candidate, analysis: Analysis, cuts: list[FactorCut], learned: set[int]) -> Site:
    """Say how one candidate ended: which of its factors are rotated, and whether a transform stands before it."""
    by_factor = {factor: cut for cut in cuts for factor in cut.factors}
    axes = candidate.written or (candidate.axis,)
    pairs = [(by_factor.get(factor), position) for axis in axes for factor, position in analysis.positions(axis)]
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
        by_learned = any(cut is not None and learned.intersection(cut.factors) for cut, _ in pairs)
        kind, why = ("online", online[0]) if online else ("free", "by a learned rotation" if by_learned else "")
    return Site(candidate.kind, candidate.node.name, candidate.name, kind, why)


def given_of(turn: Turn, analysis: Analysis, solution: Solution, why: str | None) -> Given:
    """Say how one transform of the graph's own ended."""
    factors = tuple(analysis.leaves(turn.axis))
    by = [
        _name(crossing.position.tensor)
        for cut in solution.joined
        if why is None and cut.factors == factors
        for crossing in cut.crossings
    ]
    inverse = turn.axis.tensor.user is None
    where = module_path(turn.node)
    return Given(turn.node.name, turn.rotation, inverse, where, why is None, tuple(dict.fromkeys(by)), why or "")


def _name(tensor: Tensor) -> str:
    return main_parameter_of(tensor.node) if tensor.constant else f"{tensor.node.name} online"


def _feeds(source: Position, sink: Position) -> bool:
    """Whether a transformed tensor reaches a use through repetition of heads and views only."""
    node = sink.tensor.node
    while node is not source.tensor.node:
        if not any(f"aten.{view}." in str(node.target) for view in VIEWS):
            return False
        node = node.all_input_nodes[0]
    return True
