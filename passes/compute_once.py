"""What several layers read and none of them computes, such as angles and masks, is kept in memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import ALIASES, PERMUTATIONS, RESHAPES, packet
from quarot_fx.compile_time import SIZES
from quarot_fx.graph import (
    FROZEN,
    Inserter,
    after,
    is_deterministic,
    is_float,
    is_tensor,
    module_path,
    reads_values,
    value,
)
from quarot_fx.passes.base import Pass
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
SLICES = {aten.expand.default, aten.slice.Tensor, aten.select.int}
FEWEST_READERS = 3  # a layer's queries and keys may compute their angles twice: a kernel of its own costs more


@dataclass(frozen=True)
class ComputeOnce(Pass):
    """``f(x) -> as_strided(f(x))``, the same tensor, for what depends on positions only and is read in several places.

    Inductor computes what is cheap again in every kernel that reads it, and a mask anew for every call that it is an
    argument of. To be addressed by strides a tensor has to be in memory.
    """

    requires: ClassVar[tuple[str, ...]] = ("fuse-ropes", "fuse-attention")  # which look for what angles and masks are

    def run(self, program: Program, report: PassReport) -> None:
        for node, readers in _read_by_layers(program.graph).items():
            if len(readers) < FEWEST_READERS:
                continue
            val = value(node)
            if not all(isinstance(size, int) for size in val.shape):
                report.decline(module_path(node), f"{node.name} {SIZES}")
            elif val.is_contiguous() and val.numel() > 1:
                insert, users = Inserter(program.graph, self.name, node), list(node.users)
                with program.graph.inserting_before(after(node)):
                    kept = insert.call(aten.as_strided.default, node, val.shape, val.stride())
                for user in users:
                    user.replace_input_with(node, kept)
                report.matched += 1


def _read_by_layers(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Return what is computed of positions only, and who reads it, or a view of it, that computes with more."""
    is_of_positions: dict[fx.Node, bool] = {}
    viewed: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        is_of_positions[node] = _is_of_positions(node, is_of_positions)
        if is_of_positions[node] and _is_view(node):
            source = node.all_input_nodes[0]
            viewed[node] = viewed.get(source, source)
        elif not is_of_positions[node]:
            for source in node.all_input_nodes:
                base = viewed.get(source, source)
                if is_of_positions[base] and base.op == "call_function" and _is_table(base):
                    readers[base].add(node)
    return readers


def _is_of_positions(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether no activation, weight or cache goes into a node. Those are the floating-point tensors of several axes."""
    if node.op in ("placeholder", "get_attr"):
        return not is_float(node) or value(node).ndim < 2
    is_computed = node.op == "call_function" and is_deterministic(node) and FROZEN not in node.meta
    return is_computed and all(known[source] or not reads_values(node, source) for source in node.all_input_nodes)


def _is_view(node: fx.Node) -> bool:
    return is_tensor(node) and (packet(node) in PERMUTATIONS | RESHAPES or node.target in ALIASES | SLICES)


def _is_table(node: fx.Node) -> bool:
    """Whether a node holds angles or a mask, rather than places in a cache."""
    return is_tensor(node) and (is_float(node) or value(node).dtype == torch.bool)
