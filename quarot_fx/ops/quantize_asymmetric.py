"""``quarot::quantize_asymmetric``: unsigned codes, with a scale and a zero point per group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.affine import asymmetric_scale, code_range, encode, group_count
from quarot_fx.ops.declaration import OpDeclaration, declare


def _reference(x: Tensor, bits: int, group: int | None = None, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [..., n], scale and zero [..., n / group], for ``clip`` of the range of x."""
    scale, zero = asymmetric_scale(x, bits, group, clip)
    return encode(x, scale, zero, bits).contiguous(), scale.contiguous(), zero.contiguous()


def _fake(x: Tensor, bits: int, group: int | None = None, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    code_range(bits, signed=False)
    groups = (*x.shape[:-1], group_count(x, group))
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty(groups, dtype=torch.uint8),
    )


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    x = torch.randn(2, 5, 48, generator=generator)
    for bits, group, clip in ((4, None, 0.95), (2, 16, 1.0), (8, 48, 1.0), (3, 1, 0.5)):
        yield x, bits, group, clip
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield x.to(dtype), 4
    yield x * (torch.arange(48) >= 24), 4, 24  # a group of zeros
    yield x.abs(), 4  # 0 is outside the values' range
    yield x.masked_fill(x > 2, torch.inf), 4, 12
    yield x.transpose(0, 2), 4
    yield x[:0], 4


quantize_asymmetric = declare(
    OpDeclaration(
        schema="quantize_asymmetric(Tensor x, int bits, int? group=None, float clip=1.0)"
        " -> (Tensor codes, Tensor scale, Tensor zero)",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float64: 1e-12, torch.float32: 1e-6},
    )
)
