"""Keys are balanced against the queries that read them, before they are rotated and quantised."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import PERMUTATIONS, argument, inverse_permutation, packet
from quarot_fx.attention import Read, reads_of_keys_and_values
from quarot_fx.balance import KeyBalances
from quarot_fx.config import SEARCH, UNQUANTIZED_BITS
from quarot_fx.errors import KeyBalanceNotCalibratedError
from quarot_fx.graph import Inserter, after, argument_nodes, module_path, replace_arguments, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.matching import before_copies
from quarot_fx.passes.repeated_heads import before_repetition
from quarot_fx.program import Program
from quarot_fx.quantized_reads import CacheCodes, codes_of_cache
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
AXES = 4  # batch, heads, tokens, size
HEADS, SIZE = 1, 3
TRANSPOSED = [0, 1, 3, 2]
NOT_MOVED = "all keys of the cache are brought back from their balance, since attention does not read them as they are"


@dataclass(frozen=True)
class KeyRead:
    """Where an attention reads keys.

    Attributes:
        attention: the product of queries and keys.
        keys: [batch, heads, tokens, size], each head once.
        repeats: how often in a row each head is repeated for the attention.
        place: of the keys among the attention's argument nodes.
        query_place: likewise, of the queries [batch, heads n, tokens, size].
        is_transposed: the attention reads keys [batch, heads, size, tokens].
        codes: how a cache of the caller's holds them, if as codes.
    """

    attention: fx.Node
    keys: fx.Node
    repeats: int
    place: int
    query_place: int
    is_transposed: bool
    codes: CacheCodes | None

    @property
    def query(self) -> fx.Node:
        """The queries."""
        return argument_nodes(self.attention)[self.query_place]


@dataclass(frozen=True)
class BalanceKeys(Pass):
    """``q . k = (q A^-1) . (k A)`` with the matrices that calibration found for keys that are to be quantised. A cache
    of codes balances keys itself: queries are then multiplied by what would bring all that it holds back.
    """

    requires: ClassVar[tuple[str, ...]] = ("recognize-norms",)

    def run(self, program: Program, report: PassReport) -> None:
        if self.config.key_balance == SEARCH:
            raise KeyBalanceNotCalibratedError()
        is_asked = self.config.key_balance is not None and self.config.k_bits != UNQUANTIZED_BITS
        found = KeyBalances.known(self.config.key_balance) if is_asked else None
        if found is None and not program.graph.find_nodes(op="call_function", target=quarot.balance.default):
            return
        layers, others = reads_of_keys(program.graph)
        for read, reason in others:
            if found is not None or _holds_balanced(codes_of_cache(read)):
                report.decline(module_path(read.user), f"keys are not balanced: {reason}")
        for reads in layers:
            where = module_path(reads[0].attention)
            if reads[0].codes is not None:
                for read in reads:
                    self._move(read, report)
            elif found is not None:
                balance = found.find(where)
                if balance is None:
                    report.decline(where, "no balance was found for its keys")
                else:
                    self._balance(reads, balance, report)

    def _balance(self, reads: list[KeyRead], balance: str, report: PassReport) -> None:
        keys = reads[0].keys
        insert = Inserter(keys.graph, self.name, keys)
        with keys.graph.inserting_before(after(keys)):
            balanced = insert.call(quarot.balance.default, keys, balance)
        for read in reads:
            self._attend(read, balanced, balance)
            report.matched += 1

    def _move(self, read: KeyRead, report: PassReport) -> None:
        """Let queries pay for what a cache would do to all keys that it holds."""
        restored = read.keys
        if restored.target is quarot.balance.default and argument(restored, "inverse"):
            self._attend(read, argument(restored, "x"), argument(restored, "balance"))
            report.matched += 1
        elif _holds_balanced(read.codes):
            report.decline(module_path(read.attention), NOT_MOVED)

    def _attend(self, read: KeyRead, balanced: fx.Node, balance: str) -> None:
        """Let an attention read balanced keys, and queries that go with them."""
        insert = Inserter(read.attention.graph, self.name, read.attention)
        with read.attention.graph.inserting_before(read.attention):
            query = insert.call(quarot.balance.default, read.query, balance, True)
            keys = balanced
            if read.repeats > 1:
                keys = insert.call(aten.repeat_interleave.self_int, keys, read.repeats, HEADS)
            if read.is_transposed:
                keys = insert.call(aten.transpose.int, keys, -2, -1)
        replace_arguments(read.attention, {read.query_place: query, read.place: keys})


def reads_of_keys(graph: fx.Graph) -> tuple[list[list[KeyRead]], list[tuple[Read, str]]]:
    """Return the reads of all keys that can be balanced, and the others.

    Args:
        graph: in which nothing is quantised but what a cache of codes holds.

    Returns:
        those of the same keys together, in order; and other reads, each with the reason why its keys cannot be.
    """
    found: dict[fx.Node, list[KeyRead]] = defaultdict(list)
    others = []
    for read in list(reads_of_keys_and_values(graph)):
        if read.kind == "key":
            one = _read_of(read)
            if isinstance(one, KeyRead):
                found[one.keys].append(one)
            else:
                others.append((read, one))
    return list(found.values()), others


def _read_of(read: Read) -> KeyRead | str:
    """Return a read of keys, each head once, or why they are not found."""
    attention, repeated = read.user, read.tensor
    is_transposed = read.dim != -1
    if is_transposed:
        if packet(repeated) not in PERMUTATIONS or inverse_permutation(repeated) != TRANSPOSED:
            return "axes are moved in another way than by a transpose before they are read"
        repeated = argument_nodes(repeated)[0]
    query_place = read.place - 1
    query = value(argument_nodes(attention)[query_place])
    for kind, x in (("keys", value(repeated)), ("queries", query)):
        if x.ndim != AXES:
            return f"attention reads {kind} of {x.ndim} axes, not batch, heads, tokens and size"
    insert = Inserter(attention.graph, BalanceKeys().name, attention)
    with attention.graph.inserting_before(attention):
        keys = before_copies(before_repetition(insert, repeated))
    heads = [x.shape[HEADS] for x in (value(keys), value(repeated), query)]
    sizes = [x.shape[SIZE] for x in (value(keys), query)]
    if not all(isinstance(n, int) for n in (*heads, *sizes)):
        return "numbers of heads, or their size, are known only at run time"
    once, for_attention, of_queries = heads
    if for_attention % once or of_queries % for_attention or sizes[0] != sizes[1]:
        return "queries and keys do not form groups"
    return KeyRead(attention, keys, for_attention // once, read.place, query_place, is_transposed, codes_of_cache(read))


def _holds_balanced(codes: CacheCodes | None) -> bool:
    return codes is not None and codes.is_balanced
