"""The appends of a layer's keys and of its values become one op, which one kernel runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument, equal_sizes
from quarot_fx.graph import Inserter, module_path, value
from quarot_fx.ops.append_pair import joined
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.program import Program
from quarot_fx.report import PassReport

quarot = torch.ops.quarot
CACHE = ("codes", "scale", "zero")


@dataclass(frozen=True)
class PairAppends(Pass):
    """``append(k, position), append(v, position) -> append_pair(k, v, position)``, where no one reads in between.

    A launch costs more than to store a token.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-appends",)
    tolerance: ClassVar[float | None] = None  # it computes in float32

    def run(self, program: Program, report: PassReport) -> None:
        appends = program.graph.find_nodes(op="call_function", target=quarot.append.default)
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        paired: set[fx.Node] = set()
        for first, second in pairwise(appends):
            if first in paired:
                continue
            reason = _reason_against(first, second, order)
            if reason is not None:
                report.decline(module_path(first), reason)
                continue
            keys, values = (first, second) if argument(second, "cos") is None else (second, first)
            insert = Inserter(program.graph, self.name, second)
            with program.graph.inserting_before(second):
                arguments = joined(keys.args, values.args)
                pair = insert_fused(insert, self.config, report, quarot.append_pair.default, *arguments)
            if pair is not None:
                paired |= {first, second}
                program.graph.erase_node(first)
                program.graph.erase_node(second)


def _reason_against(first: fx.Node, second: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """Return why an append is not stored together with the next one."""
    if argument(first, "position") is not argument(second, "position"):
        return "what is appended next goes to other positions"
    x, y = (value(argument(node, "x")) for node in (first, second))
    if not equal_sizes((x.shape[0], x.shape[2]), (y.shape[0], y.shape[2])) or x.dtype != y.dtype:
        return f"what is appended next is {tuple(y.shape)} of {y.dtype}, and this {tuple(x.shape)} of {x.dtype}"
    if argument(first, "cos") is not None and argument(second, "cos") is not None:
        return "what is appended next is embedded as well"
    for name in CACHE:
        for user in argument(first, name).users:
            if user not in (first, second) and order[first] < order[user] < order[second]:
                return f"the cache is read by {user.target} {user.name} before the next append"
    return None
