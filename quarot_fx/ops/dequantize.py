"""``quarot::dequantize``: codes back to numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.affine import decode
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def _reference(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (codes - zero) * scale, [..., n] in ``dtype``; scale and zero are [..., n / group]."""
    return decode(codes, scale, zero, dtype).contiguous()


def _fake(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    signed = torch.randint(-8, 8, (2, 5, 48), dtype=torch.int8, generator=generator)
    unsigned = torch.randint(0, 256, (2, 5, 48), dtype=torch.uint8, generator=generator)
    scale = torch.rand(2, 5, 3, generator=generator)
    zero = torch.randint(0, 256, (2, 5, 3), dtype=torch.uint8, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield signed, scale, None, dtype
        yield unsigned, scale, zero, dtype
    yield signed, scale.double(), None, torch.float64
    yield signed.transpose(0, 1), scale.transpose(0, 1), None, torch.float32
    yield signed[:0], scale[:0], None, torch.float32


dequantize = declare(
    OpDeclaration(
        schema="dequantize(Tensor codes, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float64: 1e-12, torch.float32: 1e-6, **HALF_TOLERANCE},
    )
)
