"""Factors of one axis that are always rotated together get one rotation: one transform runs where two would.

RoPE on pairs views head_dim as (pairs, 2), which splits it for the whole graph. Queries and keys are then rotated along
both factors at the same places, and the product of the factors is as good an axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from math import prod

from quarot_fx.basis.cut import Crossing, FactorCut


def join_adjacent(cuts: Iterable[FactorCut]) -> Iterator[FactorCut]:
    """Yield the cuts, those that agree everywhere about adjacent factors as one cut of their product.

    Any orthogonal matrix of the product will do there: no operator sees the one factor without the other.
    """
    groups: dict[Hashable, list[FactorCut]] = defaultdict(list)
    for cut in cuts:
        groups[_extent(cut)].append(cut)
    for group in groups.values():
        joined = _join(group) if len(group) > 1 else None
        yield from group if joined is None else [joined]


def _extent(cut: FactorCut) -> Hashable:
    """Which tensors are rotated and where transforms stand; unique to the cut if a tensor has the factor twice."""
    tensors = frozenset(position.tensor for position in cut.rotated)
    if len(tensors) != len(cut.rotated) or not cut.crossings:
        return id(cut)
    return tensors, frozenset(map(_place, cut.crossings))


def _place(crossing: Crossing) -> Hashable:
    uses = frozenset((use.tensor, use.dim) for use in crossing.uses)
    return crossing.position.tensor, crossing.position.dim, uses, crossing.inverse


def _join(group: list[FactorCut]) -> FactorCut | None:
    """Return one cut, told by the innermost factor's positions, or None where the factors are not side by side."""
    group = sorted(group, key=lambda cut: cut.crossings[0].position.factor)
    crossings = [{_place(crossing): crossing for crossing in cut.crossings} for cut in group]
    for place in crossings[0]:
        factors = [of_cut[place].position.factor for of_cut in crossings]
        if factors != list(range(factors[0], factors[0] + len(group))):
            return None
    whys = {place: crossing.why for place, crossing in crossings[0].items()}
    joined = [replace(crossing, why=whys[place]) for place, crossing in crossings[-1].items()]
    parts = tuple(factor for cut in group for factor in cut.factors)
    return replace(group[-1], factors=parts, size=prod(cut.size for cut in group), crossings=joined)
