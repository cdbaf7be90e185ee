"""Decides where rotations go: what is to be quantised wants them, the minimum cut says at which price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from quarot_fx.attention import reads_of_keys_and_values
from quarot_fx.basis.analysis import Analysis, Position
from quarot_fx.basis.cut import IF_FREE, NOTHING, REQUIRED, FactorCut, Want, cheapest_bases, transform_cost
from quarot_fx.basis.joining import join_adjacent
from quarot_fx.basis.operator import Axis, Tensor, Turn
from quarot_fx.basis.plan import LEARNED, Basis, Given, RotationPlan, Site, Transform
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.errors import LearnedRotationError
from quarot_fx.graph import PARAMETER, leaves_of, main_parameter_of, module_path, stored_tensor
from quarot_fx.learning.rotations import known_rotations
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.quantized_reads import QUANTIZATIONS, codes_of_cache
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles
from quarot_fx.rotation import Rotation
from quarot_fx.store import expression

VIEWS = ("view", "reshape", "expand", "transpose", "unsqueeze", "permute", "contiguous", "clone", "flatten",
         "repeat_interleave")  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An axis that is to be rotated, and how much that is worth.

    Attributes:
        kind, node, name: as of a :class:`~quarot_fx.basis.plan.Site`.
        axis: as it is read.
        worth: of a want.
        written: axes of new keys or values as they enter a cache of codes, if that is what is read.
    """

    kind: str
    node: fx.Node
    name: str
    axis: Axis
    worth: int
    written: tuple[Axis, ...] = ()


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
        turns = [] if self.config.rotation == "none" else analysis.turns
        solution, left = _solve(program.graph, analysis, candidates, turns, self.config)
        bases = tuple(solution.basis(cut, analysis) for cut in solution.joined)
        transforms = [
            transform
            for number, (cut, basis) in enumerate(zip(solution.joined, bases, strict=True))
            for transform in _transforms(cut, analysis, basis, number)
        ]
        for where in _left(self.config, bases):
            report.decline(where, "the rotation that was learned for it is not used: this graph rotates it otherwise")
        learned = {
            factor
            for cut, basis in zip(solution.joined, bases, strict=True)
            if basis.rotation.startswith(LEARNED)
            for factor in cut.factors
        }
        sites = tuple(_site(candidate, analysis, solution.cuts, learned) for candidate in candidates)
        for candidate, site in zip(candidates, sites, strict=True):
            report.matched += site.rotated != "no"
            if candidate.worth and site.rotated == "no":
                report.decline(site.name, f"{site.kind} is not rotated: {site.why}")
        given = tuple(_given(turn, analysis, solution, left.get(turn)) for turn in turns)
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


def _solve(
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
        cuts = cheapest_bases(analysis, [*wants, *_wants_of_writers(graph, analysis, heads)])
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
    turned = {turn.node: turn.axis for turn in analysis.turns}
    for read in reads_of_keys_and_values(graph):
        axis = analysis.uses[read.user, read.place].axis(read.dim)
        if (codes := codes_of_cache(read)) is not None:
            # What is held rotated is read so: a few queries are rotated and not the whole cache, in every graph.
            worth = REQUIRED if codes.is_rotated else IF_FREE
            written = tuple(turned[node] for node in codes.written_by if node in turned)
            yield Candidate(read.kind, read.user, module_path(read.user), axis, worth, written)
        elif (wanted.k_bits if read.kind == "key" else wanted.v_bits) != UNQUANTIZED_BITS:
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


def _absorber(position: Position, analysis: Analysis) -> str:
    """Name the factor of a constant in the same way in all graphs of a model."""
    node = position.tensor.node
    names = {id(stored_tensor(leaf)): leaf.meta.get(PARAMETER, str(leaf.target)) for leaf in leaves_of(node)}
    made = expression(node)
    text = "; ".join(made.text([names[id(leaf)] for leaf in made.leaves]))
    where = f"{main_parameter_of(node)} axis {position.dim} inner {_inner(analysis, position)}"
    return where if made.structure == ("$0",) else f"{where} of {text}"


def _left(config: QuarotConfig, bases: Iterable[Basis]) -> Iterator[str]:
    """Yield, of learned rotations that a graph does not take, what they were learned for."""
    if config.learned_rotations is None:
        return
    taken = {basis.rotation for basis in bases}
    for one in known_rotations(config.learned_rotations):
        if str(one.rotation) not in taken:
            yield one.absorbed_by[0]


def _transforms(cut: FactorCut, analysis: Analysis, basis: Basis, number: int) -> Iterator[Transform]:
    for crossing in cut.crossings:
        tensor, dim, _ = crossing.position
        uses = [use.tensor for use in crossing.uses]
        yield Transform(
            node=tensor.node.name,
            dim=dim,
            inner=_inner(analysis, crossing.position),
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


def _inner(analysis: Analysis, position: Position) -> int:
    tensor, dim, place = position
    inner = 1
    for leaf in analysis.leaves(tensor.axis(dim))[place + 1 :]:
        inner *= analysis.factors.size(leaf)
    return inner


def _site(candidate: Candidate, analysis: Analysis, cuts: list[FactorCut], learned: set[int]) -> Site:
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


def _given(turn: Turn, analysis: Analysis, solution: Solution, why: str | None) -> Given:
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
