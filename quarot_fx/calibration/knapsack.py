"""The multiple-choice knapsack problem: one choice for each item, within a budget, with the least loss in all.

Dynamic programming over the choices that may still win, exact. What the Lagrangian relaxation proves to be worse than
the solution known is dropped on the way (Dyer, Kayal and Walker 1984), which leaves few.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BISECTIONS = 60
BEAM = 100
ROUNDING = 1e-9  # relative: sums of losses differ by less


@dataclass(frozen=True)
class _Partial:
    """A choice for each of the first items, as a list from the last one back."""

    cost: int
    loss: float
    choice: int = -1
    before: _Partial | None = None


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Return the number of a choice for each item, with the least sum of losses among those whose costs sum up to the
    budget at most; ``None`` if there are none.

    Args:
        costs: of every choice for every item.
        losses: likewise, 0 or more.
        budget: of costs.
    """
    least = [min(of_item) for of_item in costs]
    if sum(least) > budget:
        return None
    multiplier = _multiplier(costs, losses, budget)
    best = _relaxed(costs, losses, multiplier)
    known = _total(losses, best)
    for most in (BEAM, None):  # a few partial choices find a better limit, with which all that may win are few
        best = _best(costs, losses, budget, multiplier, known, most) or best
        known = _total(losses, best)
    return best


def _best(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    multiplier: float,
    known: float,
    most: int | None,
) -> list[int]:
    """Return the best choices that come of the ``most`` partial ones with the least bounds, or of all that may win.

    May win what the relaxation at a multiplier does not prove to have more than a sum of losses that is known.
    """
    chosen = _relaxed(costs, losses, multiplier)
    least = [min(of_item) for of_item in costs]
    relaxed = [
        of_loss[choice] + multiplier * of_cost[choice]
        for of_cost, of_loss, choice in zip(costs, losses, chosen, strict=True)
    ]
    limit = known + ROUNDING * (abs(known) + multiplier * budget)
    rest, bound = sum(least), sum(relaxed) - multiplier * budget
    partials = [_Partial(0, 0.0)]
    for item, (of_cost, of_loss) in enumerate(zip(costs, losses, strict=True)):
        rest, bound = rest - least[item], bound - relaxed[item]
        longer = (
            _Partial(one.cost + cost, one.loss + loss, choice, one)
            for one in partials
            for choice, (cost, loss) in enumerate(zip(of_cost, of_loss, strict=True))
            if one.cost + cost + rest <= budget and one.loss + loss + multiplier * (one.cost + cost) + bound <= limit
        )
        partials = _undominated(longer)
        if most is not None and len(partials) > most:
            partials = heapq.nsmallest(most, partials, key=lambda one: one.loss + multiplier * one.cost)
    best: _Partial | None = min(partials, key=lambda one: one.loss, default=None)
    choices = []
    while best is not None and best.before is not None:
        choices.append(best.choice)
        best = best.before
    return choices[::-1]


def _total(losses: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(of_item[choice] for of_item, choice in zip(losses, chosen, strict=True))


def _relaxed(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], multiplier: float) -> list[int]:
    """Return the choices with the least ``loss + multiplier cost``, the cheapest of equally good ones."""

    def best(of_cost: Sequence[int], of_loss: Sequence[float]) -> int:
        return min(range(len(of_cost)), key=lambda one: (of_loss[one] + multiplier * of_cost[one], of_cost[one]))

    return [best(*one) for one in zip(costs, losses, strict=True)]


def _multiplier(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> float:
    """Return about the least multiplier whose relaxed choices meet the budget."""

    def is_met(multiplier: float) -> bool:
        chosen = _relaxed(costs, losses, multiplier)
        return sum(of_cost[choice] for of_cost, choice in zip(costs, chosen, strict=True)) <= budget

    if is_met(0.0):
        return 0.0
    low, high = 0.0, 1.0 + 2 * max(max(of_item) - min(of_item) for of_item in losses)  # costs differ by 1 at least
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def _undominated(partials: Iterable[_Partial]) -> list[_Partial]:
    """Return those than which no cheaper one has as little loss."""
    kept: list[_Partial] = []
    for one in sorted(partials, key=lambda one: (one.cost, one.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept
