"""``quarot::quantize_activation``: an activation as the left operand of an integer matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.errors import OptionError
from quarot_fx.ops.affine import code_range, group_count, split_groups
from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.quantize_asymmetric import quantize_asymmetric
from quarot_fx.ops.quantize_symmetric import quantize_symmetric

CONTAINERS = {torch.int8: 8, torch.float8_e4m3fn: 4}  # with the most bits of a code that each holds exactly
Operand = tuple[Tensor, Tensor, Tensor, Tensor]


def quantize_operand(
    x: Tensor, bits: int, group: int | None, clip: float, symmetric: bool, container: torch.dtype
) -> Operand:
    """Return codes [..., n] of the container's type, scale, zero and sum of codes [..., n / group].

    Codes are signed: those of ``quantize_asymmetric`` and its zero points less 2^(bits - 1). Symmetric codes have no
    zero points, an empty tensor. Scales are float32, zero points and sums int32. Integers of up to 4 bits are exact in
    float8_e4m3, whose tensor cores may be the faster ones.
    """
    _check(bits, container)
    if symmetric:
        codes, scale = quantize_symmetric(x, bits, group, clip)
        zero = torch.empty(0, dtype=torch.int32, device=x.device)
    else:
        offset = 2 ** (bits - 1)
        unsigned, scale, zero = quantize_asymmetric(x, bits, group, clip)
        codes, zero = (unsigned.int() - offset).to(torch.int8), zero.int() - offset
    sums = split_groups(codes, scale.shape[-1]).sum(-1, dtype=torch.int32)
    return codes.to(container), scale.float(), zero, sums


def fake_operand(
    x: Tensor, bits: int, group: int | None, clip: float, symmetric: bool, container: torch.dtype
) -> Operand:
    """Return the shapes and dtypes of :func:`quantize_operand`."""
    _check(bits, container)
    groups = (*x.shape[:-1], group_count(x, group))
    return (
        x.new_empty(x.shape, dtype=container),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(0 if symmetric else groups, dtype=torch.int32),
        x.new_empty(groups, dtype=torch.int32),
    )


def _check(bits: int, container: torch.dtype) -> None:
    code_range(bits, signed=True)
    if bits > CONTAINERS.get(container, 0):
        raise OptionError(name="container", value=container, reason=f"does not hold codes of {bits} bits exactly")


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    int8, float8 = CONTAINERS
    x = torch.randn(2, 3, 48, generator=generator)
    for symmetric in (True, False):
        for bits, group, clip in ((4, None, 0.9), (2, 16, 1.0), (8, 48, 1.0), (3, 1, 0.5)):
            yield x, bits, group, clip, symmetric, int8
        for dtype in (torch.bfloat16, torch.float16):
            yield x.to(dtype), 4, None, 0.9, symmetric, float8
        yield x * (torch.arange(48) >= 24), 4, 24, 1.0, symmetric, float8  # a group of zeros
        yield x.masked_fill(x > 2, torch.inf), 4, 12, 1.0, symmetric, int8
        yield x[..., 16:], 4, 16, 1.0, symmetric, int8  # parts of longer rows
        yield x[:, 1:], 4, None, 1.0, symmetric, int8  # rows that no one stride leads through
        yield x.transpose(0, 2), 4, None, 1.0, symmetric, int8
        yield x[:0], 4, None, 1.0, symmetric, int8
    yield torch.arange(-14, 15).to(torch.bfloat16), 4, None, 1.0, True, int8  # every second quotient is a tie
    yield x.bfloat16() * 1e30, 4, None, 0.9, True, int8
    yield torch.randn(1, 700, generator=generator), 4, None, 0.9, True, int8


quantize_activation = declare(
    OpDeclaration(
        schema="quantize_activation(Tensor x, int bits, int? group, float clip, bool symmetric, ScalarType container)"
        " -> (Tensor codes, Tensor scale, Tensor zero, Tensor sum)",
        reference=quantize_operand,
        fake=fake_operand,
        inputs=_inputs,
        tolerance={torch.float32: 1e-6},
    )
)
