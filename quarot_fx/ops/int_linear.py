"""``quarot::int_linear``: a linear layer of integer codes, accumulated exactly and scaled once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quarot_fx.errors import GroupSizeError, OptionError
from quarot_fx.ops.affine import WEIGHT_SCALE
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.ops.pack_weight import NIBBLE_OFFSET, pack_weight, packed_width, weight_codes
from quarot_fx.ops.quantize_activation import quantize_operand


def _reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    sum: Tensor,  # noqa: A002  the schema's name
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    weight_sum: Tensor | None,
    weight_bits: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``sum_g s_g t_g (codes - zero_g) (weight - weight_zero_g)^T + bias + residual``, [..., rows].

    ``codes`` [..., n] are integers in int8 or float8_e4m3fn, as ``quantize_activation`` returns them with ``scale`` s,
    ``zero`` and ``sum`` [..., groups]; no ``zero`` means 0. ``weight`` [rows, width] is what ``pack_weight`` returns;
    ``weight_scale`` t, bfloat16 or float32, and ``weight_zero`` are [rows, weight groups]; no ``weight_zero`` means 8
    for 4 bits (signed codes) and 0 for 8. ``weight_sum``, int32 [rows, all groups], is the sum of weight - weight_zero
    over each group that is one for both operands, needed where there is a ``zero``: with it and ``sum`` a kernel
    subtracts zero points after the sum. ``residual`` is [..., rows]. The result is rounded once to ``dtype``, which is
    float32 at most.

    Raises:
        OptionError: the weight's width is not that of n codes.
        GroupSizeError: neither operand's groups divide the other's.
    """
    groups = _group_count(codes, scale, weight, weight_scale, weight_bits)
    n = codes.shape[-1]
    x = codes.to(torch.float64)
    w = weight_codes(weight, weight_bits, n).double()
    offset = NIBBLE_OFFSET if weight_bits == 4 else 0
    x_scale, w_scale = _per_group(scale, groups), _per_group(weight_scale, groups)
    result = torch.zeros(*codes.shape[:-1], len(weight), device=codes.device)
    for group in range(groups):
        part = slice(group * n // groups, (group + 1) * n // groups)
        x_part = x[..., part] if zero is None else x[..., part] - _per_group(zero, groups)[..., group, None]
        origin = offset if weight_zero is None else _per_group(weight_zero, groups)[..., group, None]
        product = (x_part @ (w[..., part] - origin).mT).float()  # sums of integers below 2^53: exact
        result = result + product * (x_scale[..., group, None] * w_scale[..., group])
    if bias is not None:
        result = result + bias
    if residual is not None:
        result = result + residual
    return result.to(dtype)


def _per_group(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups // x.shape[-1], -1)


def _group_count(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, weight_bits: int) -> int:
    """Return how many groups the contracted axis has where both operands' scales are constant."""
    size, of_x, of_w = codes.shape[-1], scale.shape[-1], weight_scale.shape[-1]
    if weight.shape[-1] != packed_width(size, weight_bits):
        held = f"{weight.shape[-1]} bytes hold another number of {weight_bits}-bit codes than {size}"
        raise OptionError(name="weight", value=tuple(weight.shape), reason=held)
    groups = max(of_x, of_w)
    for count in (of_x, of_w):
        if groups % count or size % groups:
            raise GroupSizeError(option="group", group=size // groups, size=size // count, where="the other operand")
    return groups


def _fake(codes: Tensor, scale: Tensor, *operands: Any) -> Tensor:
    _, _, weight, weight_scale, _, _, weight_bits, _, _, dtype = operands
    _group_count(codes, scale, weight, weight_scale, weight_bits)
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    int8, float8 = torch.int8, torch.float8_e4m3fn
    case = partial(random_arguments, generator)
    shapes = ((1, 20, 512), (2, 130, 600), (5, 64, 256), (17, 33, 1024), (70, 70, 272))
    for tokens, rows, n in shapes:
        for container in (int8, float8):
            yield case(tokens, rows, n, container=container)
    yield case(3, 40, 512, weight_symmetric=False)
    yield case(1, 40, 512, symmetric=False, weight_symmetric=False)
    yield case(20, 40, 512, symmetric=False, weight_symmetric=False, container=float8)
    yield case(3, 40, 512, weight_group=128)
    yield case(3, 40, 512, group=128)
    yield case(20, 40, 512, group=64, weight_group=64, symmetric=False)
    yield case(20, 40, 512, group=128, weight_group=128, weight_symmetric=False, container=float8)
    yield case(3, 40, 272, bits=8, weight_bits=8)
    yield case(3, 40, 272, bits=8, weight_bits=8, weight_symmetric=False, symmetric=False)
    yield case(3, 40, 512, bits=8)
    for tokens in (1, 20):
        yield case(tokens, 40, 512, dtype=torch.bfloat16, bias=True, residual=True)
        yield case(tokens, 40, 512, dtype=torch.float16, bias=True)
        yield _extreme_case(tokens, int8)
        yield _extreme_case(tokens, float8)
    yield case(1, 40, 272, bits=8, weight_bits=8)
    yield case(2, 40, 272, bits=8, weight_bits=8, weight_symmetric=False, symmetric=False)
    yield case(0, 40, 512)


def random_arguments(
    generator: torch.Generator,
    tokens: int,
    rows: int,
    n: int,
    bits: int = 4,
    weight_bits: int = 4,
    symmetric: bool = True,
    weight_symmetric: bool = True,
    group: int | None = None,
    weight_group: int | None = None,
    container: torch.dtype = torch.int8,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    residual: bool = False,
) -> tuple[Any, ...]:
    """Return arguments of the op for a random activation [tokens, n] and weight [rows, n]."""
    x = torch.randn(tokens, n, generator=generator)
    codes, scale, zero, sums = quantize_operand(x, bits, group, 0.9, symmetric, container)
    w = torch.randn(rows, n, generator=generator)
    w_codes, w_scale, w_zero, _ = quantize_operand(w, weight_bits, weight_group, 1.0, weight_symmetric, torch.int8)
    packed = pack_weight(w_codes, weight_bits)
    w_scale = w_scale.to(WEIGHT_SCALE)
    offset = NIBBLE_OFFSET if weight_bits == 4 else 0
    w_zero = w_zero + offset
    groups = max(scale.shape[-1], w_scale.shape[-1])
    origin = offset if weight_symmetric else w_zero.repeat_interleave(n // w_zero.shape[-1], -1)
    w_sums = (weight_codes(packed, weight_bits, n) - origin).unflatten(-1, (groups, -1)).sum(-1, dtype=torch.int32)
    return (
        codes,
        scale,
        None if symmetric else zero,
        sums,
        packed,
        w_scale,
        None if weight_symmetric else w_zero,
        None if symmetric else w_sums,
        weight_bits,
        torch.randn(rows, generator=generator).to(dtype) if bias else None,
        torch.randn(tokens, rows, generator=generator).to(dtype) if residual else None,
        dtype,
    )


def _extreme_case(tokens: int, container: torch.dtype) -> tuple[Any, ...]:
    """Return the largest codes, with odd ones at the end of each run of 128, and scales of 1: every bit shows."""
    codes = torch.full((tokens, 1024), -8, dtype=torch.int8)
    codes[:, 127::128] = 7
    weight = torch.full((40, 1024), -8, dtype=torch.int8)
    weight[1::2, 126::128] = 7
    weight[::4] = 7
    ones, sums = torch.ones(tokens, 1), codes.sum(-1, keepdim=True, dtype=torch.int32)
    packed = pack_weight(weight, 4)
    return codes.to(container), ones, None, sums, packed, torch.ones(40, 1), None, None, 4, None, None, torch.float32


int_linear = declare(
    OpDeclaration(
        schema="int_linear(Tensor codes, Tensor scale, Tensor? zero, Tensor sum, Tensor weight, Tensor weight_scale,"
        " Tensor? weight_zero, Tensor? weight_sum, int weight_bits, Tensor? bias, Tensor? residual, ScalarType dtype)"
        " -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
