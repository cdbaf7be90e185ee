"""``quarot::norm_int_linear``: a norm, the quantisation of its result, and a linear layer of integer codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.activations import check_activation
from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.gated_int_linear import gated_int_linear
from quarot_fx.ops.int_linear import int_linear, random_arguments
from quarot_fx.ops.norm_quantize import norm_quantize

WEIGHT_BITS = 4
FLIP = 0.05  # of the largest result: what a code makes of it that lies between two


def _reference(
    x: Tensor,
    gain: Tensor | None,
    eps: float,
    bits: int,
    clip: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    activation: str | None,
) -> Tensor:
    """Return ``int_linear``, or with an ``activation`` ``gated_int_linear``, of ``norm_quantize(x)``, x [..., n].

    Codes are symmetric, in int8, with one scale a token; those of the weight are symmetric, of 4 bits, with one scale a
    row.

    Raises:
        OptionError: the weight's width is not that of n codes, or 8 does not divide half of the rows of a gate.
        UnknownOptionError: there is no such activation.
    """
    codes, scale, _, sums, _ = norm_quantize(x, None, None, gain, eps, bits, None, clip, True, torch.int8)
    operands = codes, scale, None, sums, weight, weight_scale, None, None, WEIGHT_BITS, bias
    if activation is None:
        return int_linear(*operands, residual, dtype)
    return gated_int_linear(*operands, dtype, activation)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    *_, weight, _, _, _, dtype, activation = rest
    if activation is not None:
        check_activation(activation)
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (1 if activation is None else 2)), dtype=dtype)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    def case(
        n: int,
        rows: int,
        dtype: torch.dtype = torch.bfloat16,
        activation: str | None = None,
        bits: int = 4,
        clip: float = 0.9,
        **how: Any,
    ) -> tuple[Any, ...]:
        codes, _, _, _, weight, scale, _, _, _, bias, residual, dtype = random_arguments(
            generator, 1, rows, n, dtype=dtype, **how
        )
        x = torch.randn(codes.shape, generator=generator).to(dtype)
        return x, None, 1e-5, bits, clip, weight, scale, bias, residual, dtype, activation

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield case(512, 20, dtype)
        yield case(600, 48, dtype, "silu")
        yield case(1024, 272, dtype, residual=True)
        x, _, *rest = case(256, 64, dtype, bias=True)
        yield x, torch.rand(256, generator=generator).to(dtype), *rest
    yield case(272, 48, activation="gelu_tanh", bits=8, bias=True)
    yield case(512, 48, clip=0.3)
    x, *rest = case(512, 20)
    yield torch.zeros_like(x), *rest
    yield x[:0], *rest


norm_int_linear = declare(
    OpDeclaration(
        schema="norm_int_linear(Tensor x, Tensor? gain, float eps, int bits, float clip, Tensor weight,"
        " Tensor weight_scale, Tensor? bias, Tensor? residual, ScalarType dtype, str? activation)"
        " -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), FLIP),
    )
)
