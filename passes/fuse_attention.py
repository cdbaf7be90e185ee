"""Attention of few queries to a cache becomes one op, which reads every key and value once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quarot_fx.aliasing import argument, equal_sizes
from quarot_fx.attention import stand_for
from quarot_fx.graph import Inserter, module_path, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.passes.matching import number
from quarot_fx.passes.repeated_heads import before_repetition
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot
MOST_QUERIES = 16  # of a sequence: from here on time goes into products, not into reading the cache


@dataclass(frozen=True)
class FuseAttention(Pass):
    """``attention(q, repeat(k), repeat(v), mask) -> attend(q, k, v, mask)`` of few queries, as when tokens are decoded.
    That of many, as of a prompt, is left to PyTorch's kernels.
    """

    requires: ClassVar[tuple[str, ...]] = ("rotate",)

    def run(self, program: Program, report: PassReport) -> None:
        for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            if reason := _reason_against(node):
                report.decline(module_path(node), reason)
                continue
            q, key, val, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
            while mask is not None and mask.target is aten.expand.default:  # the kernel reads one mask for all heads
                mask = mask.args[0]
            insert = Inserter(program.graph, self.name, node)
            with program.graph.inserting_before(node):
                once = [before_repetition(insert, heads) for heads in (key, val)]
                if equal_sizes(*(value(heads).shape[1:2] for heads in once)):
                    key, val = once
                fused = insert_fused(
                    insert, self.config, report, quarot.attend.default, q, key, val, mask, _scale(node)
                )  # fmt: skip
            if fused is not None:
                stand_for(fused, node)
                node.replace_all_uses_with(fused)
                program.graph.erase_node(node)  # no dead code to PyTorch: it might have drawn random numbers


def _reason_against(attention: fx.Node) -> str | None:
    q, key, val = (value(argument(attention, name)) for name in ("query", "key", "value"))
    if q.ndim != 4:
        return f"queries have {q.ndim} axes, and the kernel takes batch, heads, queries and size"
    queries, keys = q.shape[2], key.shape[2]
    if not all(isinstance(size, int) for size in (queries, q.shape[1], key.shape[1], q.shape[3])):
        return "how many queries there are is not known at compile time"
    if queries > MOST_QUERIES:
        return f"there are more queries than {MOST_QUERIES}, for which PyTorch has kernels"
    if argument(attention, "dropout_p"):
        return "it drops some of the weights at random"
    if argument(attention, "is_causal") and not (queries == 1 and statically_known_true(keys == 1)):
        return "later keys are hidden without a mask, as in a prompt, for which PyTorch has kernels"
    shapes = [value(attention).shape[:3], (*key.shape[:1], *q.shape[1:3]), (*val.shape[:1], *q.shape[1:3])]
    if not all(equal_sizes(shape, q.shape[:3]) for shape in shapes):
        return "sequences or queries are shared: sizes of queries, keys, values and the mask are broadcast"
    if _scale(attention) is None:
        return "the factor of scores is not known at compile time"
    return None


def _scale(attention: fx.Node) -> float | None:
    scale = argument(attention, "scale")
    return value(argument(attention, "query")).shape[-1] ** -0.5 if scale is None else number(scale)
