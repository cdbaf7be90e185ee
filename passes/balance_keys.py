"""Keys are balanced against the queries that read them, before they are rotated and quantised."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument, equal_sizes
from quarot_fx.attention import Read, reads_of_keys_and_values
from quarot_fx.balance import KeyBalances
from quarot_fx.config import SEARCH, UNQUANTIZED_BITS
from quarot_fx.errors import KeyBalanceNotCalibratedError
from quarot_fx.graph import Inserter, after, argument_nodes, is_tensor, module_path, replace_arguments, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.repeated_heads import before_repetition
from quarot_fx.program import Program
from quarot_fx.quantized_reads import codes_of_cache
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
AXES = 4  # batch, heads, tokens, size
UNKNOWN = "heads are repeated in a way that is not known, or for other readers, too"


@dataclass(frozen=True)
class KeyRead:
    """Where an attention reads keys.

    Attributes:
        attention: the product of queries and keys.
        keys: [batch, heads, tokens, size], each head once.
        user, place: what reads them on the way to the attention, and where among its argument nodes.
        query_place: of the queries [batch, heads n, tokens, size] among the attention's.
        codes: whether a cache of the caller's holds them as codes.
    """

    attention: fx.Node
    keys: fx.Node
    user: fx.Node
    place: int
    query_place: int
    codes: bool

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
        for reads in reads_of_keys(program.graph, report if is_asked else None):
            first = reads[0]
            where = module_path(first.attention)
            if first.codes:
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
            replace_arguments(read.user, {read.place: balanced})
            self._balance_query(read, balance)
            report.matched += 1

    def _move(self, read: KeyRead, report: PassReport) -> None:
        """Let queries pay for what a cache would do to all keys that it holds."""
        restored = read.keys
        if restored.target is not quarot.balance.default or not argument(restored, "inverse"):
            return
        replace_arguments(read.user, {read.place: argument(restored, "x")})
        self._balance_query(read, argument(restored, "balance"))
        report.matched += 1

    def _balance_query(self, read: KeyRead, balance: str) -> None:
        insert = Inserter(read.attention.graph, self.name, read.attention)
        with read.attention.graph.inserting_before(read.attention):
            query = insert.call(quarot.balance.default, read.query, balance, True)
        replace_arguments(read.attention, {read.query_place: query})


def reads_of_keys(graph: fx.Graph, report: PassReport | None = None) -> list[list[KeyRead]]:
    """Return the reads of all keys that can be balanced, those of the same keys together, in order.

    Args:
        graph: in which nothing is quantised but what a cache of codes holds.
        report: takes the reasons why others cannot.
    """
    found: dict[fx.Node, list[KeyRead]] = defaultdict(list)
    for read in list(reads_of_keys_and_values(graph)):
        if read.kind == "key":
            one = _read_of(read)
            if isinstance(one, KeyRead):
                found[one.keys].append(one)
            elif report is not None:
                report.decline(module_path(read.user), f"keys are not balanced: {one}")
    return list(found.values())


def _read_of(read: Read) -> KeyRead | str:
    """Return a read of keys, each head once, or why they are not found."""
    user, place = read.user, read.place
    if read.dim != -1:
        if read.tensor.target is not aten.transpose.int or {d % AXES for d in read.tensor.args[1:3]} != {2, 3}:  # type: ignore[operator]
            return "axes are moved in another way than by a transpose before they are read"
        user, place = read.tensor, 0
    repeated = argument_nodes(user)[place]
    if value(repeated).ndim != AXES:
        return f"attention reads {value(repeated).ndim} axes, not batch, heads, tokens and size"
    insert = Inserter(read.user.graph, BalanceKeys().name, read.user)
    known = set(read.user.graph.nodes)
    with read.user.graph.inserting_before(read.user):
        once = before_repetition(insert, repeated)  # heads that follow each other share a query's group
    axis = None
    if once not in known and once.target is aten.squeeze.dim:  # the axis along which heads are repeated
        source, axis = once.all_input_nodes[0], argument(once, "dim")
        read.user.graph.erase_node(once)
        once = source
    while (source := argument_nodes(user)[place]) is not once or _is_unchanged(source) or value(source).ndim != AXES:
        if source is once:
            if source.target is aten.unsqueeze.default and argument(source, "dim") == axis:
                axis = None
            elif not _is_unchanged(source):
                return UNKNOWN
            once = source.all_input_nodes[0]
        user, place = source, 0
        if len(user.users) != 1 or not argument_nodes(user) or not is_tensor(argument_nodes(user)[0]):
            return UNKNOWN
    if axis is not None:
        return UNKNOWN
    keys = once
    query_place = 0 if read.dim == -1 else read.place - 1
    query = value(argument_nodes(read.user)[query_place])
    heads, size = value(keys).shape[-3], value(keys).shape[-1]
    if query.ndim != AXES or not all(isinstance(n, int) for n in (heads, size, query.shape[1])):
        return "queries have other axes than batch, heads, tokens and size"
    if query.shape[1] % heads or query.shape[-1] != size:
        return "queries and keys do not form groups"
    return KeyRead(read.user, keys, user, place, query_place, codes_of_cache(read) is not None)


def _is_unchanged(node: fx.Node) -> bool:
    """Whether a node is a slice of all that there is."""
    return node.target is aten.slice.Tensor and equal_sizes(value(node).shape, value(node.all_input_nodes[0]).shape)
