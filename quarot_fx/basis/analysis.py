"""Walks a graph, applies the table of rules, and resolves what every axis is made of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from quarot_fx.basis.factors import Factors
from quarot_fx.basis.operator import Axis, Operator, Pin, Tensor, Tie, Turn
from quarot_fx.basis.rules import rules
from quarot_fx.graph import FROZEN, Constants, is_float


class Position(NamedTuple):
    """One factor of one axis of one tensor or use: the smallest thing that has a basis."""

    tensor: Tensor
    dim: int
    factor: int  # place among the leaves of the axis, outermost first


@dataclass(frozen=True)
class UnknownOperator:
    """An operator without a rule, which therefore is a barrier."""

    target: str
    node: fx.Node


class Analysis:
    """The axes of a graph, with what its operators say of them.

    Attributes:
        results: node -> its result tensors.
        uses: (user, place among its argument nodes) -> the use.
        unknown: operators that read and write floating-point tensors and have no rule.
        turns: transforms that the graph has already, in order. Each has to be taken over, its axis rotated as it says,
            or left, its axis pinned.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.factors = Factors()
        self.results: dict[fx.Node, list[Tensor]] = {}
        self.uses: dict[tuple[fx.Node, int], Tensor] = {}
        self.unknown: list[UnknownOperator] = []
        self.turns: list[Turn] = []
        self._ties: list[Tie] = []
        self._pins: list[Pin] = []
        self._constants = Constants(graph)
        for node in graph.nodes:
            self._visit(node)
        self._leaves: dict[Axis, list[int]] = {}
        self._resolve()

    def tensors(self) -> list[Tensor]:
        """Return all results and uses."""
        return [t for results in self.results.values() for t in results] + list(self.uses.values())

    def leaves(self, axis: Axis) -> list[int]:
        """Return the factors of an axis; none if its size is 1 or symbolic."""
        if axis not in self._leaves:
            self._leaves[axis] = self.factors.leaves(axis.tensor.factors[axis.dim] or ())
        return self._leaves[axis]

    def pin(self, axis: Axis, why: str) -> None:
        """Keep an axis canonical, whatever the rules allow."""
        self._pins.append(Pin(axis, why))

    def positions(self, axis: Axis) -> list[tuple[int, Position]]:
        """Return the factors of an axis with their positions."""
        return [(leaf, Position(*axis, place)) for place, leaf in enumerate(self.leaves(axis))]

    def ties_by_factor(self, wanted: set[int]) -> dict[int, list[tuple[Position, Position]]]:
        """Return the pairs of positions that must share a basis, for the wanted factors."""
        found: dict[int, list[tuple[Position, Position]]] = defaultdict(list)
        for tie in self._ties:
            left = [x for axis in tie.left for x in self.positions(axis)]
            right = [x for axis in tie.right for x in self.positions(axis)]
            for (factor, a), (_, b) in zip(left, right, strict=True):
                if factor in wanted:
                    found[factor].append((a, b))
        return found

    def pins_by_factor(self, wanted: set[int]) -> dict[int, list[tuple[Position, str]]]:
        """Return the positions that must be canonical and why, for the wanted factors."""
        found: dict[int, list[tuple[Position, str]]] = defaultdict(list)
        for pin in self._pins:
            for factor, position in self.positions(pin.axis):
                if factor in wanted:
                    found[factor].append((position, pin.why))
        return found

    def edges_by_factor(self, wanted: set[int]) -> dict[int, list[tuple[Position, list[Position]]]]:
        """Return, for the wanted factors, every result's position with the positions of its uses."""
        users: dict[Tensor, list[Tensor]] = defaultdict(list)
        for use in self.uses.values():
            users[self.results[use.node][0]].append(use)
        found: dict[int, list[tuple[Position, list[Position]]]] = defaultdict(list)
        for result, uses in users.items():
            for axis in result.axes():
                for factor, position in self.positions(axis):
                    if factor in wanted:
                        found[factor].append((position, [position._replace(tensor=use) for use in uses]))
        return found

    def _visit(self, node: fx.Node) -> None:
        op = Operator(node, self.factors)
        for use in op.uses:
            self.uses[node, use.index] = use
        self.results[node] = op.results
        for result in op.results:
            result.constant = node in self._constants
        if node.op == "placeholder":
            op.barrier("is an input of the graph")
        elif node.op == "get_attr":
            op.barrier("is stored in the canonical basis")
        elif node.op == "output":
            op.barrier("is an output of the graph")
        elif _is_getitem(node):
            self._pass_on(node, op)
        else:
            self._apply(node, op)
        for use in op.uses:
            if FROZEN in use.node.meta:
                op.barrier(use.node.meta[FROZEN], [use, *self.results[use.node]])
            elif not is_float(use.node):
                op.barrier("reads integers", [use])
        self._ties += op.ties
        self._pins += op.pins
        self.turns += op.turns

    def _pass_on(self, node: fx.Node, op: Operator) -> None:
        """``getitem`` of a tuple is the tuple's tensor itself."""
        source, index = node.args
        origin = next((t for t in self.results[source] if t.index == index), None)  # type: ignore[index]
        for axis in op.results[0].axes() if op.results else ():
            if origin is None:
                op.pin(axis, "is an unknown entry of a tuple")
            else:
                op.tie(origin.axis(axis.dim), axis)

    def _apply(self, node: fx.Node, op: Operator) -> None:
        computes = any(is_float(use.node) for use in op.uses) and any(
            result.node.meta["val"][result.index].dtype.is_floating_point
            if isinstance(result.node.meta["val"], tuple | list)
            else is_float(result.node)
            for result in op.results
        )
        rule = rules().get(str(node.target)) if computes or not op.uses else None
        if rule is not None:
            rule(op)
            return
        op.barrier("has no rule" if computes else "does not compute with real numbers")
        if computes:
            self.unknown.append(UnknownOperator(str(node.target), node))

    def _resolve(self) -> None:
        """Unify factors across edges and ties; what cannot be brought into one factorisation is pinned."""
        edges = [
            Tie((result,), (use.axis(result.dim),), "")
            for use in self.uses.values()
            for result in self.results[use.node][0].axes()
        ]
        for tie in edges:
            if not any(axis.is_opaque for axis in (*tie.left, *tie.right)):
                self.factors.unify(*self._factors_of(tie))
        kept = []
        for tie in self._ties:
            axes = (*tie.left, *tie.right)
            if not any(axis.is_opaque for axis in axes) and self.factors.unify(*self._factors_of(tie)):
                kept.append(tie)
            else:
                self._pins += [Pin(axis, f"{tie.why}: regroups sizes that do not nest") for axis in axes]
        self._ties = kept

    def _factors_of(self, tie: Tie) -> tuple[list[int], list[int]]:
        return tuple(
            [f for axis in side for f in axis.tensor.factors[axis.dim] or ()] for side in (tie.left, tie.right)
        )  # type: ignore[return-value]


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
