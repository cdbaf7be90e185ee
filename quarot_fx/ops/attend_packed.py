"""``quarot::attend_packed``: attention of few queries to a cache of packed codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.attend import attention
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.ops.dequantize import dequantize
from quarot_fx.ops.pack import pack
from quarot_fx.ops.quantize_asymmetric import quantize_asymmetric
from quarot_fx.ops.unpack import unpack


def _reference(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    v_size: int,
) -> Tensor:
    """Return ``quarot::attend`` of q [batch, heads, queries, size] and of keys and values in the dtype of q, which are
    stored as ``quarot::append`` stores them: codes of so many bits, [batch, kv heads, keys, ceil(size bits / 8)], and
    scale and zero point of each group, [batch, kv heads, keys, size / group]. A value has ``v_size`` elements.
    """
    k = dequantize(unpack(k_codes, k_bits, q.shape[-1], False), k_scale, k_zero, q.dtype)
    v = dequantize(unpack(v_codes, v_bits, v_size, False), v_scale, v_zero, q.dtype)
    return attention(q, k, v, mask, scale)


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], rest[-1]))


def _lowest_beyond(keys: int, first: int, dtype: torch.dtype) -> Tensor:
    """Return a mask [1, 1, 1, keys] that adds the lowest number from ``first`` on, as some models' masks do."""
    return torch.where(torch.arange(keys) < first, 0.0, torch.finfo(dtype).min).to(dtype)[None, None, None]


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    def stored(shape: tuple[int, ...], bits: int, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale, zero = quantize_asymmetric(torch.randn(shape, generator=generator), bits, group)
        return pack(codes, bits), scale, zero

    def case(
        batch: int,
        heads: int,
        kv_heads: int,
        queries: int,
        keys: int,
        size: int,
        bits: tuple[int, int] = (4, 4),
        group: int | None = None,
        dtype: torch.dtype = torch.float32,
        mask: Tensor | None = None,
        v_size: int | None = None,
    ) -> tuple[Any, ...]:
        q, shape = torch.randn(batch, heads, queries, size, generator=generator).to(dtype), (batch, kv_heads, keys)
        k, v = stored((*shape, size), bits[0], group), stored((*shape, v_size or size), bits[1], group)
        return (q, *k, *v, mask, size**-0.5, *bits, v_size or size)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield case(2, 4, 2, 1, 300, 64, dtype=dtype)
        yield case(1, 3, 3, 3, 77, 80, (2, 4), dtype=dtype)
        yield case(1, 6, 2, 16, 40, 96, (8, 2), 32, dtype=dtype)
        yield case(1, 4, 1, 1, 1, 128, (4, 8), 64, dtype=dtype)
        yield case(1, 8, 1, 1, 50, 128, (2, 8), dtype=dtype)
        yield case(2, 6, 2, 4, 100, 96, (8, 4), dtype=dtype, mask=torch.rand(2, 1, 4, 100, generator=generator) < 0.5)
        yield case(1, 2, 1, 1, 70, 256, (4, 2), dtype=dtype, mask=_lowest_beyond(70, 30, dtype))
    place = torch.arange(270)
    length = torch.tensor([45, 270])[:, None, None, None]
    is_causal = place <= torch.tensor([150, 151, 152])[:, None]
    for mask in (place < length, is_causal, torch.where(is_causal, 0.0, -torch.inf), place < 0):
        yield case(2, 4, 2, 3, 270, 32, mask=mask)
    yield case(1, 2, 1, 1, 20, 48, (3, 4))
    yield case(1, 2, 1, 1, 20, 30, (4, 2), v_size=22)  # of the last byte only a part
    yield case(1, 2, 1, 2, 40, 16, (8, 2), 16)
    yield case(1, 2, 1, 1, 70, 48, (8, 4), v_size=24)
    yield case(1, 2, 1, 1, 0, 32)
    yield case(0, 2, 1, 1, 5, 32)
    q, *rest = case(1, 2, 2, 1, 50, 32)
    rest = [x[:, :, ::2] if isinstance(x, Tensor) else x for x in rest]  # of a longer cache
    yield q, *rest


attend_packed = declare(
    OpDeclaration(
        schema="attend_packed(Tensor q, Tensor k_codes, Tensor k_scale, Tensor k_zero, Tensor v_codes, Tensor v_scale, "
        "Tensor v_zero, Tensor? mask, float scale, int k_bits, int v_bits, SymInt v_size) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
