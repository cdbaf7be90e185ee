"""``quarot::attend``: attention of few queries, as when tokens are decoded, to keys and values in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return ``softmax(scale q k^T + mask) v``, [batch, heads, queries, value size], in the dtype of q.

    q is [batch, heads, queries, size], k [batch, kv heads, keys, size] and v [batch, kv heads, keys, value size], all
    of one dtype and any strides; heads that follow each other share one of k and v. The mask broadcasts to [batch,
    heads, queries, keys]: a boolean one says what to attend to, any other is added. All is computed in float32 at
    least. A query that attends to nothing gets zeros, as from ``scaled_dot_product_attention``. Keys and values that no
    query attends to may be read or not: they must be finite.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (batch, heads, queries, size), (kv_heads, keys) = q.shape, k.shape[1:3]
    if not keys:  # a softmax over nothing has no maximum
        return q.new_zeros(batch, heads, queries, v.shape[-1])
    rows = heads // kv_heads * queries  # that share one head of k and v
    scores = (q.to(dtype).reshape(batch, kv_heads, rows, size) @ k.to(dtype).mT).reshape(batch, heads, queries, keys)
    scores = scores * scale
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.ops.aten._safe_softmax(scores, -1).reshape(batch, kv_heads, rows, keys)
    return (weights @ v.to(dtype)).reshape(batch, heads, queries, v.shape[-1]).to(q.dtype)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[-1]))


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch, heads, kv_heads, queries, keys, size in (
            (2, 4, 2, 1, 300, 64),
            (1, 3, 3, 3, 77, 80),
            (1, 6, 2, 16, 40, 96),
            (1, 4, 1, 1, 1, 128),
            (1, 2, 1, 1, 130, 256),
        ):
            k, v = normal(2, batch, kv_heads, keys, size, dtype=dtype)
            yield normal(batch, heads, queries, size, dtype=dtype), k, v, None, size**-0.5
    q, (k, v) = normal(2, 4, 3, 32), normal(2, 2, 2, 270, 32)
    place, length = torch.arange(270), torch.tensor([45, 270])[:, None, None, None]
    is_written = place < length  # [batch, 1, 1, keys]: a cache that is longer than what it holds
    is_causal = place <= torch.tensor([150, 151, 152])[:, None]  # [queries, keys]
    slope = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None] * (place - 269)  # [heads, 1, keys], as in ALiBi
    seen_by_some = torch.tensor([True, False, True])[:, None]  # [queries, 1]
    masks = (is_written, is_causal, is_written & is_causal, slope, seen_by_some, place % 5 == 0, place > 200)
    for mask in masks:
        yield q, k, v, mask, 0.25
        if mask.dtype == torch.bool:
            yield q, k, v, torch.where(mask, 0.0, -torch.inf), 0.25
    for dtype in (torch.bfloat16, torch.float16):
        # Heads inside tokens, and padding of the lowest number that there is, which one query sees only.
        k, v = normal(2, 2, 270, 2, 32, dtype=dtype).transpose(2, 3)
        lowest = torch.finfo(dtype).min
        yield q.to(dtype), k, v, is_written, 0.25
        yield q.to(dtype), k, v, torch.where(is_causal & seen_by_some, 0.0, lowest).to(dtype), 0.25
    q, k, v = normal(1, 2, 1, 48), normal(1, 2, 20, 48), normal(1, 2, 20, 24)
    yield q, k, v, None, 1.0  # values of another size
    yield q, k.mT.contiguous().mT, v.mT.contiguous().mT, None, 1.0  # [size, keys] in memory
    yield q, k, v, torch.zeros(1, 1, 1, 20, dtype=torch.bool), 1.0
    yield q, k[:, :, :0], v[:, :, :0], None, 1.0
    yield q[:0], k[:0], v[:0], None, 1.0


attend = declare(
    OpDeclaration(
        schema="attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
        reference=attention,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
