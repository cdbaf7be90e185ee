"""What wants rotating: the inputs of linear layers that are quantised, keys and values, and what writes these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from quarot_fx.attention import reads_of_keys_and_values
from quarot_fx.basis.analysis import Analysis
from quarot_fx.basis.cut import IF_FREE, NOTHING, REQUIRED, Want
from quarot_fx.basis.operator import Axis
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.graph import module_path
from quarot_fx.linear_like import linear_likes
from quarot_fx.quantized_reads import codes_of_cache
from quarot_fx.roles import Roles


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


def candidates_of(graph: fx.Graph, analysis: Analysis, config: QuarotConfig) -> Iterator[Candidate]:
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


def wants_of_writers(graph: fx.Graph, analysis: Analysis, heads: set[int]) -> Iterator[Want]:
    """Yield wants of the linear layers that write keys and values, to be rotated wherever attention can be.

    Without a cache that costs nothing. A cache of the caller's pins what enters it, and one small transform of the new
    tokens is the price for the same rounded weights in all graphs of a model, with a cache and without one.
    """
    for linear in linear_likes(graph):
        for factor, position in analysis.positions(analysis.results[linear.node][0].axis(-1)):
            if factor in heads:
                yield Want(position, REQUIRED)
