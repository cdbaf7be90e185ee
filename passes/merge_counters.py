"""Counters that advance by the same number, as each layer of a cache counts its tokens, advance together."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.graph import Inserter, is_float, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.readers import CASTS
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
MOST_TOGETHER = 128  # pointers among a kernel's arguments, whose bytes are limited


@dataclass(frozen=True)
class MergeCounters(Pass):
    """``a.copy_(a + n), b.copy_(b + n) -> _foreach_add([a, b], n)``, copied likewise: a launch, where each was one.

    It comes right before the first copy, where nothing reads the old numbers any more, so that it may write in place.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-appends", "pair-appends")

    def run(self, program: Program, report: PassReport) -> None:
        groups: dict[tuple[int, torch.dtype, torch.device], list[fx.Node]] = defaultdict(list)
        for copy in program.graph.find_nodes(op="call_function", target=aten.copy_.default):
            if (step := _step_of(copy)) is not None:
                counter = value(copy.args[0])
                groups[step, counter.dtype, counter.device].append(copy)
        for (step, *_), copies in groups.items():
            for start in range(0, len(copies), MOST_TOGETHER):
                together = copies[start : start + MOST_TOGETHER]
                if len(together) > 1:
                    self._merge(together, step)
                    report.matched += len(together)

    def _merge(self, copies: list[fx.Node], step: int) -> None:
        first = copies[0]
        insert = Inserter(first.graph, self.name, first)
        with first.graph.inserting_before(first):
            advanced = insert.call(aten._foreach_add.Scalar, [copy.args[0] for copy in copies], step)
            results = [insert.call(operator.getitem, advanced, index) for index in range(len(copies))]
        for copy, result in zip(copies, results, strict=True):
            copy.replace_input_with(copy.args[1], result)  # type: ignore[arg-type]


def _step_of(copy: fx.Node) -> int | None:
    """Return the number by which what is copied advances the integer that it is copied to, if it does."""
    counter, total = copy.args[:2]
    if not isinstance(counter, fx.Node) or counter.op != "placeholder" or not isinstance(total, fx.Node):
        return None
    if (
        total.target is not aten.add.Tensor
        or total.kwargs
        or len(total.users) > 1
        or not _is_same(total.args[0], counter)
    ):
        return None
    is_integer = value(counter).numel() == 1 and not is_float(counter)
    is_written_once = sum(user.target is aten.copy_.default and user.args[0] is counter for user in counter.users) == 1
    step = total.args[1]
    return step if is_integer and is_written_once and type(step) is int else None


def _is_same(source: object, counter: fx.Node) -> bool:
    """Whether a node is a counter, or a cast of it to what it is."""
    if source is counter or not isinstance(source, fx.Node):
        return source is counter
    val, own = value(source), value(counter)
    is_cast = str(source.target) in CASTS and source.args[0] is counter
    return is_cast and (val.dtype, val.device, val.shape) == (own.dtype, own.device, own.shape)
