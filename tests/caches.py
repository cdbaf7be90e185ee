"""What a cache of few bits is compared with: a plain one whose keys and values are quantised by the same ops."""

from __future__ import annotations

from typing import Any

import torch
from models import tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import quarot_fx
from quarot_fx import ops
from quarot_fx.config import default_clip


def quantized(x: Tensor, bits: int = 4, group: int | None = None) -> Tensor:
    """What attention sees of keys or values x [..., d], spelled out in the ops that a rewritten graph has."""
    if bits == 16:
        return x
    rotation = f"hadamard-{x.shape[-1]}"
    codes = ops.quantize_asymmetric(ops.rotate(x, rotation), bits, group, default_clip("k_clip", bits))
    return ops.rotate(ops.dequantize(*codes, x.dtype), rotation, inverse=True)


class SimulatedCache(DynamicCache):
    """Stores numbers of the model's dtype that are those of a cache of few bits."""

    def __init__(self, model: PreTrainedModel, k_bits: int = 4, v_bits: int = 4, group: int | None = None) -> None:
        super().__init__(config=model.config)
        self.bits, self.group = (k_bits, v_bits), group

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pairs = zip((key_states, value_states), self.bits, strict=True)
        return super().update(*(quantized(x, bits, self.group) for x, bits in pairs), *args, **kwargs)


def double_model(model_type: str, **config: Any) -> PreTrainedModel:
    """A tiny model in float64."""
    return in_double(tiny_model(model_type, **config))


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """A model in float64, where the order of a sum hardly ever moves a number over the border of its code."""
    model.set_experts_implementation("eager")  # the others are for shorter numbers
    return model.double()


def logits_in_chunks(model: Any, cache: Any, ids: Tensor, *sizes: int) -> Tensor:
    """Logits of all tokens [batch, tokens, vocabulary], given so many at a time."""
    logits, start = [], int(cache.get_seq_length())
    with torch.no_grad():
        for chunk in ids.split(list(sizes), dim=1):
            positions = torch.arange(start, start := start + chunk.shape[1]).expand_as(chunk)
            logits.append(model(chunk, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def make(kind: str, model: PreTrainedModel, room: int, batch_size: int = 1, **options: Any) -> Any:
    """A cache of a kind: ``"static"`` with room for so many tokens, or ``"growing"``."""
    return quarot_fx.generation_cache(model, room if kind == "static" else None, batch_size, **options)
