"""The cheapest legal assignment of bases is a minimum s-t cut.

Nodes are positions. The source side is canonical, the sink side rotated. Operators that need a common basis merge
their positions; pins hang on the source, wants on the sink; the edge between a tensor and its uses costs what an
online transform of that tensor costs, once however many uses share it, and nothing if the tensor is a constant.
Factors of axes are independent of each other, so each is a problem of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from quarot_fx.basis.analysis import Analysis, Position

CANONICAL, ROTATED = "canonical", "rotated"
NOTHING = 0
IF_FREE = 1  # what a want is worth that no online transform should be paid for
REQUIRED = 10**15  # and one that any number of them should be


@dataclass(frozen=True)
class Want:
    """A use that is better quantised in a rotated basis.

    Attributes:
        position: one factor of the axis that is to be rotated.
        worth: ``IF_FREE`` or ``REQUIRED``.
    """

    position: Position
    worth: int


@dataclass
class Crossing:
    """Where the cut runs between a tensor and some of its uses: a transform has to be there.

    Attributes:
        position: the factor of the tensor that is transformed.
        uses: the uses that read the transformed tensor.
        inverse: the tensor is rotated and these uses are canonical.
        why: what keeps the tensor from being in the basis that its uses want.
    """

    position: Position
    uses: list[Position]
    inverse: bool
    why: str = ""


@dataclass
class FactorCut:
    """The solution for one factor, or for several that are side by side and rotated as one.

    Attributes:
        factors: the factors, outermost first.
        size: their number of elements, the order of their rotation.
        rotated: positions that are in the rotated basis.
        crossings: the transforms, of constants too.
        unmet: wants that are not rotated, with the reason.
    """

    factors: tuple[int, ...]
    size: int
    rotated: set[Position] = field(default_factory=set)
    crossings: list[Crossing] = field(default_factory=list)
    unmet: dict[Position, str] = field(default_factory=dict)

    @property
    def is_online(self) -> bool:
        """Whether some transform has to run when the model runs."""
        return any(not crossing.position.tensor.constant for crossing in self.crossings)


def cheapest_bases(analysis: Analysis, wants: Iterable[Want]) -> list[FactorCut]:
    """Solve the minimum cut of every factor that some want asks for, in order of appearance."""
    by_factor: dict[int, list[Want]] = defaultdict(list)
    for want in wants:
        tensor, dim, place = want.position
        by_factor[analysis.leaves(tensor.axis(dim))[place]].append(want)
    wanted = set(by_factor)
    ties = analysis.ties_by_factor(wanted)
    pins = analysis.pins_by_factor(wanted)
    edges = analysis.edges_by_factor(wanted)
    return [
        _solve(
            factor,
            analysis.factors.size(factor),
            ties[factor],
            pins[factor],
            edges[factor],
            by_factor[factor],
        )
        for factor in by_factor
    ]


def transform_cost(numel: int, order: int) -> int:
    """Cost of rotating a tensor along a factor online: elements x log2(order), in sixteenths."""
    return max(IF_FREE + 1, int(16 * numel * math.log2(order)))


def _solve(
    factor: int,
    size: int,
    ties: list[tuple[Position, Position]],
    pins: list[tuple[Position, str]],
    edges: list[tuple[Position, list[Position]]],
    wants: list[Want],
) -> FactorCut:
    import networkx as nx  # here, so that importing quarot_fx stays light

    merged = _Merged(ties)
    network: Any = nx.DiGraph()
    network.add_nodes_from((CANONICAL, ROTATED))
    reasons: dict[Hashable, str] = {}
    for position, why in pins:
        reasons.setdefault(merged.root(position), why)
        network.add_edge(CANONICAL, merged.root(position))  # no capacity is infinite capacity
    for want in wants:
        root = merged.root(want.position)
        worth = network.get_edge_data(root, ROTATED, {"capacity": 0})["capacity"] + want.worth
        network.add_edge(root, ROTATED, capacity=worth)
    for result, uses in edges:
        cost = 0 if result.tensor.constant else transform_cost(result.tensor.numel, size)
        root, rotate, restore = merged.root(result), ("rotate", result), ("restore", result)
        network.add_edge(root, rotate, capacity=cost)
        network.add_edge(restore, root, capacity=cost)
        for use in uses:
            network.add_edge(rotate, merged.root(use))
            network.add_edge(merged.root(use), restore)
    _, (canonical, _) = nx.minimum_cut(network, CANONICAL, ROTATED)

    cut = FactorCut((factor,), size)
    is_rotated = lambda position: merged.root(position) not in canonical  # noqa: E731
    because = _Reasons(network, canonical, reasons)
    for result, uses in edges:
        cut.rotated.update(position for position in (result, *uses) if is_rotated(position))
        differing = [use for use in uses if is_rotated(use) != is_rotated(result)]
        if differing:
            blame = differing[0] if is_rotated(result) else result
            cut.crossings.append(Crossing(result, differing, is_rotated(result), because(merged.root(blame))))
    cut.unmet = {w.position: because(merged.root(w.position)) for w in wants if not is_rotated(w.position)}
    return cut


class _Merged:
    """Positions that must share a basis, as one: a union-find."""

    def __init__(self, pairs: Iterable[tuple[Position, Position]]) -> None:
        self._parent: dict[Position, Position] = {}
        for left, right in pairs:
            self._parent[self.root(left)] = self.root(right)

    def root(self, position: Position) -> Position:
        path = []
        while (parent := self._parent.get(position, position)) != position:
            path.append(position)
            position = parent
        self._parent.update(dict.fromkeys(path, position))
        return position


class _Reasons:
    """Why a position is canonical: the nearest pin, going through edges that the cut does not cross."""

    def __init__(self, network: Any, canonical: set[Hashable], reasons: dict[Hashable, str]) -> None:
        self._network, self._canonical, self._reasons = network, canonical, reasons

    def __call__(self, start: Hashable) -> str:
        seen, pending = {start}, deque([start])
        while pending:
            node = pending.popleft()
            if node in self._reasons:
                return self._reasons[node]
            for near in (*self._network.predecessors(node), *self._network.successors(node)):
                if near in self._canonical and near not in seen and near != CANONICAL:
                    seen.add(near)
                    pending.append(near)
        return "rotating it would cost more than it is worth"
