"""Attention that a model spells expensively is spelled so that the fastest kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.backends import cuda

from quarot_fx.aliasing import argument
from quarot_fx.compile_time import SIZES, CompileTimeValues
from quarot_fx.graph import Inserter, fake_mode_of, fake_result, module_path, value
from quarot_fx.passes.base import Pass
from quarot_fx.passes.repeated_heads import before_repetition
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten = torch.ops.aten
FUSED_KERNELS = ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention")


class Pattern(Enum):
    """Which keys a mask lets a query see."""

    ALL = "hides nothing"
    CAUSAL = "hides later keys"
    OTHER = "hides other keys than all later ones, as a sliding window does"
    ADDS = "adds other numbers than 0 and -inf"


@dataclass(frozen=True)
class SimplifyAttention(Pass):
    """``attention(q, repeat(k), repeat(v), mask) -> attention(q, k, v, is_causal)``, where the mask is known at compile
    time, whatever it is made of, and hides nothing, or all that comes later.

    Heads stay repeated where a mask stays: the kernels of GPUs that take a mask take no groups of queries.
    """

    def run(self, program: Program, report: PassReport) -> None:
        attentions = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        masks = dict.fromkeys(mask for node in attentions if (mask := argument(node, "attn_mask")) is not None)
        known = CompileTimeValues(program.graph)
        patterns = known.judge([mask for mask in masks if known.reason_against(mask) is None], pattern_of)
        for node in attentions:
            mask = argument(node, "attn_mask")
            if mask is not None:
                reason = known.reason_against(mask)
                if reason is not None or patterns[mask] not in (Pattern.ALL, Pattern.CAUSAL):
                    report.decline(module_path(node), f"the mask {reason or patterns[mask].value}")
                    continue
                is_causal = argument(node, "is_causal") or patterns[mask] is Pattern.CAUSAL
                _change(node, attn_mask=None, is_causal=is_causal)
                report.matched += 1
            self._share_heads(node, report)

    def _share_heads(self, node: fx.Node, report: PassReport) -> None:
        """Let the queries of a group read the key and value that they share."""
        repeated = [argument(node, "key"), argument(node, "value")]
        insert = Inserter(node.graph, self.name, node)
        with node.graph.inserting_before(node):
            key, val = shared = [before_repetition(insert, heads) for heads in repeated]
        if shared == repeated:
            return
        reason = _reason_to_repeat(node, key, val)
        if reason is not None:
            report.decline(module_path(node), f"heads stay repeated: {reason}")
        else:
            _change(node, key=key, value=val, enable_gqa=True)
            report.matched += 1


# -- masks -----------------------------------------------------------------------------------------


def pattern_of(mask: torch.Tensor) -> Pattern:
    """Return what a mask [..., queries, keys] does, which is True for what a query sees, or is added to its scores."""
    mask = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]  # each value once
    visible = mask if mask.dtype is torch.bool else mask == 0
    if visible.all():
        return Pattern.ALL
    # The lowest finite number is no -inf: where the visible scores are as low, it hides nothing.
    if mask.dtype is not torch.bool and not (visible | (mask == -torch.inf)).all():
        return Pattern.ADDS
    # Of fewer queries than keys, kernels disagree on whether the first or the last of both belong together.
    if mask.shape[-1] != mask.shape[-2]:
        return Pattern.OTHER
    triangle = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril_()
    return Pattern.CAUSAL if (visible == triangle).all() else Pattern.OTHER


def _change(call: fx.Node, **arguments: Any) -> None:
    """Change arguments of a call by name, and know its result again. It stays the node that plans and reports name."""
    names = [parameter.name for parameter in call.target._schema.arguments]  # type: ignore[union-attr]
    named = dict(zip(names, call.args, strict=False)) | call.kwargs | arguments
    call.args = tuple(named.pop(name) for name in ("query", "key", "value"))
    call.kwargs = named
    call.meta["val"] = fake_result(call, fake_mode_of(call.graph))


# -- repeated heads --------------------------------------------------------------------------------


def _reason_to_repeat(attention: fx.Node, key: fx.Node, val: fx.Node) -> str | None:
    query, repeated = (value(argument(attention, name)) for name in ("query", "key"))
    tensors = [query, value(key), value(val)]
    if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
        return f"attention {SIZES}"
    if query.shape[-3] != repeated.shape[-3] or tensors[1].shape[-3] != tensors[2].shape[-3]:
        return "queries, keys and values do not form groups"
    if query.device.type == "cpu":  # its kernel takes groups; what it does not take repeats heads as the model did
        return None
    # Without a fused kernel, all scores would be held in memory.
    options = [argument(attention, name) for name in ("dropout_p", "is_causal")]
    params = cuda.SDPAParams(*tensors, None, *options, True)  # type: ignore[call-arg]
    is_fused = query.device.type == "cuda" and any(getattr(cuda, takes)(params) for takes in FUSED_KERNELS)
    return None if is_fused else f"no fused kernel of the device {query.device.type!r} takes groups"
