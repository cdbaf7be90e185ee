"""``quarot::norm_quantize``: a norm, on its way into a linear layer; optionally behind an addition to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.ops.mean_square import mean_square
from quarot_fx.ops.project_out import project_out
from quarot_fx.ops.quantize_activation import fake_operand, quantize_operand

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _reference(
    x: Tensor,
    addend: Tensor | None,
    direction: Tensor | None,
    gain: Tensor | None,
    eps: float,
    bits: int,
    group: int | None,
    clip: float,
    symmetric: bool,
    container: torch.dtype,
) -> Result:
    """Return ``quantize_activation`` of ``s / sqrt(mean_square(s) + eps) * gain``, and s = x + addend, [..., n].

    s is rounded to the dtype of x, and an empty tensor if there is no addend, as it then is x. What follows is computed
    in float32: with a unit vector ``direction`` [n], s loses that direction first, as in LayerNorm.
    """
    stream = torch.empty(0, dtype=x.dtype, device=x.device) if addend is None else x + addend
    y = (x if addend is None else stream).float()
    if direction is not None:
        y = project_out(y, direction)
    y = y * torch.rsqrt(mean_square(y) + eps)
    if gain is not None:
        y = y * gain.float()
    return (*quantize_operand(y, bits, group, clip, symmetric, container), stream)


def _fake(x: Tensor, addend: Tensor | None, direction: Tensor | None, gain: Tensor | None, *rest: Any) -> Result:
    _, bits, group, clip, symmetric, container = rest
    operand = fake_operand(x, bits, group, clip, symmetric, container)
    return (*operand, x.new_empty(0 if addend is None else x.shape))


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    int8, float8 = torch.int8, torch.float8_e4m3fn
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in (48, 320):
            x, addend = torch.randn(2, 2, 3, n, generator=generator).to(dtype)
            gain = torch.rand(n, generator=generator).to(dtype)
            direction = torch.full((n,), n**-0.5)
            yield x, None, None, None, 1e-6, 4, None, 0.9, True, int8
            yield x, addend, None, gain, 1e-5, 4, n // 4, 1.0, False, int8
            yield x, addend, direction, None, 1e-5, 4, None, 0.9, True, float8
    x = torch.randn(2, 3, 96, generator=generator).bfloat16()
    # Rows that are parts of longer ones, and rows that no one stride leads through.
    yield x[..., :48], x[..., 48:], None, None, 1e-6, 4, None, 0.9, True, int8
    yield x[:, :2], x.transpose(0, 1)[:2], None, None, 1e-6, 4, None, 0.9, True, int8
    yield torch.zeros(3, 48), None, None, None, 1e-6, 4, None, 0.9, True, int8
    yield torch.randn(1, 48, generator=generator) * 1e15, None, None, None, 1e-6, 8, None, 1.0, False, int8
    yield torch.zeros(0, 48), None, None, None, 1e-6, 4, None, 0.9, True, int8


norm_quantize = declare(
    OpDeclaration(
        schema="norm_quantize(Tensor x, Tensor? addend, Tensor? direction, Tensor? gain, float eps, int bits,"
        " int? group, float clip, bool symmetric, ScalarType container)"
        " -> (Tensor codes, Tensor scale, Tensor zero, Tensor sum, Tensor stream)",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
        code_flips=0.01,
    )
)
