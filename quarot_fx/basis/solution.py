"""The cheapest bases of a graph, and which rotation leads into each of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from quarot_fx.basis.analysis import Analysis, Position
from quarot_fx.basis.candidates import Candidate, wants_of_writers
from quarot_fx.basis.cut import REQUIRED, FactorCut, Want, cheapest_bases
from quarot_fx.basis.joining import join_adjacent
from quarot_fx.basis.operator import Turn
from quarot_fx.basis.plan import Basis
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import LearnedRotationError
from quarot_fx.graph import PARAMETER, leaves_of, main_parameter_of, stored_tensor
from quarot_fx.learning.rotations import known_rotations
from quarot_fx.quantized_reads import QUANTIZATIONS
from quarot_fx.rotation import Rotation
from quarot_fx.store import expression


@dataclass(frozen=True)
class Solution:
    """The cheapest bases.

    Attributes:
        cuts: of every factor.
        joined: the same, with one cut for factors that are rotated together.
        heads: factors of keys and values.
        named: factors of the axis of a transform of the graph's own -> the rotation that it names.
        config: says which rotation the others take.
    """

    cuts: list[FactorCut]
    joined: list[FactorCut]
    heads: set[int]
    named: dict[tuple[int, ...], Rotation]
    config: QuarotConfig

    def basis(self, cut: FactorCut, analysis: Analysis) -> Basis:
        """Return what a cut leads into.

        Raises:
            LearnedRotationError: a matrix was learned that does not fit, or the graph names another one.
        """
        absorbed_by = tuple(
            _absorber(crossing.position, analysis) for crossing in cut.crossings if crossing.position.tensor.constant
        )
        is_named, is_of_heads = cut.factors in self.named, bool(self.heads.intersection(cut.factors))
        is_free = bool(absorbed_by) and not is_named and (is_of_heads or not cut.is_online)
        rotation = self._rotation(cut, is_of_heads)
        learned = None
        if self.config.learned_rotations is not None and (is_free or is_named):
            learned = known_rotations(self.config.learned_rotations).find(absorbed_by)
        if learned is not None and is_named and str(rotation) != learned:
            reason = f"it holds them rotated by {rotation}"
            remedy = "Learn with heads=False for a model that runs with such a cache, or use an ordinary one."
            raise LearnedRotationError(what=f"what a cache holds of {absorbed_by[0]}", reason=reason, remedy=remedy)
        if learned is not None and Rotation.parse(learned).order != cut.size:
            reason = f"{learned} does not fit its {cut.size} elements"
            raise LearnedRotationError(what=absorbed_by[0], reason=reason, remedy="Learn it for this model.")
        return Basis(learned or str(rotation), is_free, is_of_heads, absorbed_by)

    def _rotation(self, cut: FactorCut, is_of_heads: bool) -> Rotation:
        """Return the rotation of a cut for which none was learned. Where the graph names none, it is random where
        weights alone pay for it; online a plain Hadamard, which needs no signs.

        Keys and values get a plain one always: whether it is online depends on the cache, and a model's graphs with and
        without one must agree on its weights.
        """
        if cut.factors in self.named:
            return self.named[cut.factors]
        if cut.is_online or is_of_heads:
            return Rotation("hadamard", cut.size)
        kind = "random" if self.config.rotation == "random" else "random-hadamard"
        return Rotation(kind, cut.size, self.config.seed)

    def reason_to_leave(self, turn: Turn, analysis: Analysis) -> str | None:
        """Return why the bases do not make an identity of a transform of the graph's own, or None if they do."""
        positions = [position for _, position in analysis.positions(turn.axis)]
        unmet = [cut.unmet[position] for cut in self.cuts for position in positions if position in cut.unmet]
        if unmet or not positions:
            return next(iter(unmet), "its size is not known, or is 1")
        factors = tuple(analysis.leaves(turn.axis))
        if all(cut.factors != factors for cut in self.joined):
            return "its axis is made of parts that are not rotated alike everywhere"
        if str(self.named[factors]) != turn.rotation:
            return f"its axis is rotated by {self.named[factors]}, as another transform of the graph's own says"
        return None


def solve(
    graph: fx.Graph, analysis: Analysis, candidates: list[Candidate], turns: list[Turn], config: QuarotConfig
) -> tuple[Solution, dict[Turn, str]]:
    """Find the cheapest bases, and the transforms of the graph's own that stay as they are, with the reason.

    Such a transform only says in which basis it has its axis. Where all others are in the same one, nothing is left for
    it to do: whatever else has to be transformed for that costs no more than it did itself. Where they cannot be, it is
    taken as it is, and the rest is solved anew.
    """
    left: dict[Turn, str] = {}
    while True:
        kept = [turn for turn in turns if turn not in left]
        heads = {
            factor
            for axis in (
                *(candidate.axis for candidate in candidates if candidate.kind != "linear"),
                *(turn.axis for turn in kept if _is_quantized_next(turn)),
            )
            for factor in analysis.leaves(axis)
        }
        worths = [
            *((candidate.axis, candidate.worth) for candidate in candidates if candidate.worth),
            *((turn.axis, REQUIRED) for turn in kept),
        ]
        wants = [Want(position, worth) for axis, worth in worths for _, position in analysis.positions(axis)]
        cuts = cheapest_bases(analysis, [*wants, *wants_of_writers(graph, analysis, heads)])
        named: dict[tuple[int, ...], Rotation] = {}
        for turn in kept:
            named.setdefault(tuple(analysis.leaves(turn.axis)), Rotation.parse(turn.rotation))
        solution = Solution(cuts, list(join_adjacent(cuts)), heads, named, config)
        reasons = {turn: why for turn in kept if (why := solution.reason_to_leave(turn, analysis)) is not None}
        if not reasons:
            return solution, left
        for turn, why in reasons.items():
            analysis.pin(turn.axis, f"{turn.node.name}: stays as it is")
            left[turn] = why


def _is_quantized_next(turn: Turn) -> bool:
    """Whether a transform of the graph's own is of keys or values that enter a cache of codes."""
    return any(user.target in QUANTIZATIONS for user in turn.node.users)


def _absorber(position: Position, analysis: Analysis) -> str:
    """Name the factor of a constant in the same way in all graphs of a model."""
    node = position.tensor.node
    names = {id(stored_tensor(leaf)): leaf.meta.get(PARAMETER, str(leaf.target)) for leaf in leaves_of(node)}
    made = expression(node)
    text = "; ".join(made.text([names[id(leaf)] for leaf in made.leaves]))
    where = f"{main_parameter_of(node)} axis {position.dim} inner {inner_size(analysis, position)}"
    return where if made.structure == ("$0",) else f"{where} of {text}"


def inner_size(analysis: Analysis, position: Position) -> int:
    """Return how many elements of an axis lie inside of one of its factors."""
    tensor, dim, place = position
    inner = 1
    for leaf in analysis.leaves(tensor.axis(dim))[place + 1 :]:
        inner *= analysis.factors.size(leaf)
    return inner
