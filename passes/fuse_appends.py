"""New keys or values, quantised and written to a cache, become one op, which writes the cache in place."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument, equal_sizes
from quarot_fx.graph import FROZEN, Constants, Inserter, after, is_tensor, module_path, reads_values, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
TOKENS = 2  # the axis of a cache along which tokens are appended
LAST = sys.maxsize  # the end of a slice that has none
CACHE_AXES = 4  # batch, heads, tokens, and codes or groups


@dataclass(frozen=True)
class Write:
    """One tensor of a cache, and what is written to it.

    Attributes:
        cache: the input that holds it.
        written: its content afterwards, ``index_copy(cache, axis, position, rows)``.
        kept: the node at the end of the graph that makes this the input's content.
    """

    cache: fx.Node
    written: fx.Node
    kept: fx.Node


@dataclass(frozen=True)
class Source:
    """What is quantised: ``rotate(balance(embed(x, cos, sin), balance), rotation)``, or less of it."""

    x: fx.Node
    cos: fx.Node | None = None
    sin: fx.Node | None = None
    balance: str | None = None
    rotation: str | None = None


@dataclass(frozen=True)
class FuseAppends(Pass):
    """``cache <- index_copy(cache, position, pack(quantize(rotate(x)))) -> append(cache, x, position)`` for codes,
    scale and zero point together; ``dequantize(quantize(rotate(x)))``, which a prompt attends to, is what
    ``append_dequantize`` returns besides. A window takes the last tokens alone of a prompt that is longer.

    The op writes its inputs, so that readers of the cache stay behind it: no pass that moves them may come later.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-ropes", "fuse-attention", "fuse-packed-attention")
    tolerance: ClassVar[float | None] = None  # it computes in float32

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for packed in program.graph.find_nodes(op="call_function", target=quarot.pack.default):
            if packed in constants:  # a weight's codes
                continue
            quantized = _quantization_of(argument(packed, "codes"))
            if quantized is None:
                made_by = argument(packed, "codes").target
                report.decline(module_path(packed), f"codes that are stored are those of {made_by}, not of new tokens")
                continue
            parts = [_parts(quantized, index) for index in range(3)]
            sources = [packed, *(_written(part) for part in parts[1:])]
            reason = _reason_against(quantized, parts, sources)
            if reason is not None:
                report.decline(module_path(packed), reason)
            else:
                self._fuse(quantized, parts, [_write(rows) for rows in sources], report)

    def _fuse(self, quantized: fx.Node, parts: list[list[fx.Node]], writes: list[Write], report: PassReport) -> None:
        source = _source(quantized)
        position = argument(writes[0].written, "index")
        arguments: list[Any] = [
            *(write.cache for write in writes), source.x, position,
            source.cos, source.sin, source.balance, source.rotation,
            *(argument(quantized, name) for name in ("bits", "group", "clip")),
        ]  # fmt: skip
        read = list(_reads_of_codes(parts))
        op = quarot.append_dequantize.default if read else quarot.append.default
        latest = max(node for node in arguments if isinstance(node, fx.Node))
        insert = Inserter(quantized.graph, self.name, writes[0].written)
        with quantized.graph.inserting_before(after(latest)):  # all that reads the cache afterwards comes later
            appended = insert_fused(insert, self.config, report, op, *arguments)
        if appended is None:
            return
        for node in read:
            node.replace_all_uses_with(appended)
        for write in writes:
            quantized.graph.erase_node(write.kept)
            write.written.replace_all_uses_with(write.cache)


def _quantization_of(codes: fx.Node) -> fx.Node | None:
    """Return the quantisation whose codes these are, of the last tokens or all, or ``None`` if they are others."""
    while _takes_last_tokens(codes):
        codes = codes.all_input_nodes[0]
    is_part = codes.target is operator.getitem and codes.args[1] == 0
    made = codes.all_input_nodes[0] if is_part else codes
    return made if made.target is quarot.quantize_asymmetric.default else None


def _takes_last_tokens(view: fx.Node) -> bool:
    """Whether a node is a slice of the last tokens, or of all."""
    if view.target is not aten.slice.Tensor:
        return False
    if _is_whole(view, view.all_input_nodes[0]):
        return True
    ends, size = argument(view, "end"), value(view.all_input_nodes[0]).shape[TOKENS]
    is_to_the_end = isinstance(ends, int) and isinstance(size, int) and ends >= size
    return argument(view, "dim") == TOKENS and argument(view, "step") == 1 and (ends in (None, LAST) or is_to_the_end)


def _is_whole(part: fx.Node, of: fx.Node) -> bool:
    return equal_sizes(value(part).shape, value(of).shape)


def _parts(quantized: fx.Node, index: int) -> list[fx.Node]:
    """Return the nodes that are one result, codes, scale or zero, of a quantisation, of the last tokens or all."""
    pending = [user for user in quantized.users if user.target is operator.getitem and user.args[1] == index]
    found: list[fx.Node] = []
    while pending:
        found.append(pending.pop())
        pending += [user for user in found[-1].users if _takes_last_tokens(user)]
    return found


def _written(parts: list[fx.Node]) -> fx.Node | None:
    """Return which of the nodes that are one result is written to positions."""
    return next((part for part in parts for user in part.users if user.target is aten.index_copy.default), None)


def _reads_of_codes(parts: list[list[fx.Node]]) -> Iterator[fx.Node]:
    """Yield the nodes that turn codes back into the numbers of the new tokens."""
    for user in (user for codes in parts[0] for user in codes.users):
        is_read = user.target is quarot.dequantize.default and _is_whole(argument(user, "codes"), parts[0][0])
        if is_read and argument(user, "scale") in parts[1] and argument(user, "zero") in parts[2]:
            yield user


def _write(rows: Any) -> Write:
    """Return the only write of rows, which :func:`_reason_against` found there."""
    (written,) = (user for user in rows.users if user.target is aten.index_copy.default)
    (kept,) = (user for user in written.users if user.target is aten.copy_.default)
    return Write(written.all_input_nodes[0], written, kept)


def _source(quantized: fx.Node) -> Source:
    """Return what is quantised, before what only the quantisation needs was done to it."""
    x: Any = argument(quantized, "x")
    rotation = balance = None
    if _is_done(x, quarot.rope_rotate.default):
        return Source(*(argument(x, name) for name in ("x", "cos", "sin", "balance", "rotation")))
    if _is_done(x, quarot.rotate.default) and argument(x, "inner") == 1 and _is_along_last_axis(x):
        x, rotation = argument(x, "x"), argument(x, "rotation")
    if _is_done(x, quarot.balance.default):
        x, balance = argument(x, "x"), argument(x, "balance")
    return Source(x, balance=balance, rotation=rotation)


def _is_done(x: fx.Node, target: torch._ops.OpOverload) -> bool:
    """Whether an op has done, and not undone, what x is, for one reader."""
    return x.target is target and len(x.users) == 1 and FROZEN not in x.meta and not argument(x, "inverse")


def _is_along_last_axis(rotate: fx.Node) -> bool:
    ndim = value(rotate).ndim
    return bool(argument(rotate, "dim") % ndim == ndim - 1)


def _reason_against(quantized: fx.Node, parts: list[list[fx.Node]], sources: list[fx.Node | None]) -> str | None:
    positions, reads = set(), set(_reads_of_codes(parts))
    expected = {*reads, *(part for same in parts for part in same), sources[0]}
    for name, rows in zip(("codes", "scales", "zero points"), sources, strict=True):
        copies = [user for user in rows.users if user.target is aten.index_copy.default] if rows is not None else []
        if rows is None or len(copies) != 1:
            return f"{name} are written to positions of a cache {len(copies)} times"
        if (reason := _reason_against_write(name, copies[0], rows)) is not None:
            return reason
        positions.add(argument(copies[0], "index"))
        expected.add(copies[0])
    if len(positions) > 1:
        return "codes, scale and zero point are written to different positions"
    for rows in (*(part for same in parts for part in same), sources[0]):
        others = [user for user in rows.users if user not in expected] if rows is not None else []
        if others:
            return f"codes are also read by {others[0].target} {others[0].name}"
    dtype = value(argument(quantized, "x")).dtype
    for read in reads:
        if argument(read, "dtype") != dtype:
            return f"new tokens are read as {argument(read, 'dtype')}, and were {dtype}"
    return None


def _reason_against_write(name: str, written: fx.Node, rows: fx.Node) -> str | None:
    """Return why an ``index_copy`` is not an append to a cache that the caller holds."""
    cache, axis = argument(written, "self"), argument(written, "dim")
    if argument(written, "source") is not rows or not is_tensor(cache):
        return f"{name} are not what is written"
    if value(cache).ndim != CACHE_AXES or axis % CACHE_AXES != TOKENS:
        return f"{name} are written along axis {axis} of {value(cache).ndim}, and the kernel takes tokens along 2 of 4"
    if cache.op != "placeholder" or FROZEN in cache.meta:
        return f"{name} are written to what is no input of the graph, or is mutated elsewhere"
    kept = [user for user in written.users if user.target is aten.copy_.default]
    if [user.args[:2] for user in kept] != [(cache, written)]:
        return f"{name} are written to a copy of the cache, which stays as it is"
    others = [user for user in cache.users if user not in (written, *kept) and reads_values(user, cache)]
    if others:
        return f"what the cache held before is read by {others[0].target} {others[0].name}"
    return None
