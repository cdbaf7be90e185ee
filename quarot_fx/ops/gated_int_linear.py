"""``quarot::gated_int_linear``: two linear layers of integer codes as one, of which one gates the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.activations import ACTIVATIONS, activated, check_activation
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.ops.int_linear import int_linear, random_arguments
from quarot_fx.ops.interleave_rows import separate


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
    dtype: torch.dtype,
    activation: str,
) -> Tensor:
    """Return ``activation(gate) * up``, [..., rows / 2], where the rows of a weight make gate and up in turn.

    Gate and up are what ``int_linear`` makes of the arguments; ``interleave_rows`` says whose each row is. The result
    is rounded once to ``dtype``, which is float32 at most.

    Raises:
        OptionError: 8 does not divide half of the rows, or the weight's width is not that of n codes.
        GroupSizeError: neither operand's groups divide the other's.
        UnknownOptionError: there is no such activation.
    """
    weights = (weight, weight_scale, weight_zero, weight_sum, weight_bits)
    gate, up = separate(int_linear(codes, scale, zero, sum, *weights, bias, None, torch.float32))
    return activated(up, gate, activation).to(dtype)


def _fake(*arguments: Any) -> Tensor:
    *operands, dtype, activation = arguments
    check_activation(activation)
    gate, _ = separate(int_linear(*operands, None, dtype))
    return gate.new_empty(gate.shape)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    int8, float8 = torch.int8, torch.float8_e4m3fn

    def case(tokens: int, rows: int, n: int, activation: str = "silu", **how: Any) -> tuple[Any, ...]:
        *operands, _, dtype = random_arguments(generator, tokens, rows, n, **how)
        return *operands, dtype, activation

    for tokens, rows, n in ((1, 16, 512), (2, 272, 600), (5, 64, 256), (16, 32, 1024), (70, 144, 272)):
        for container in (int8, float8):
            yield case(tokens, rows, n, container=container)
    for activation in ACTIVATIONS:
        yield case(3, 48, 256, activation)
    for tokens in (1, 20):
        yield case(tokens, 48, 512, "gelu_tanh", dtype=torch.bfloat16, bias=True)
        yield case(tokens, 48, 512, dtype=torch.float16, bias=True)
        yield case(tokens, 48, 512, symmetric=False, weight_symmetric=False)
    yield case(20, 48, 512, symmetric=False, weight_symmetric=False, container=float8)
    yield case(20, 48, 512, group=64, weight_group=64, symmetric=False)
    yield case(20, 48, 512, group=128, weight_group=128, weight_symmetric=False, container=float8)
    yield case(3, 48, 512, weight_group=128)
    yield case(3, 48, 272, bits=8, weight_bits=8, weight_symmetric=False, symmetric=False)
    yield case(3, 48, 512, bits=8)
    yield case(0, 48, 512)


gated_int_linear = declare(
    OpDeclaration(
        schema="gated_int_linear(Tensor codes, Tensor scale, Tensor? zero, Tensor sum, Tensor weight,"
        " Tensor weight_scale, Tensor? weight_zero, Tensor? weight_sum, int weight_bits, Tensor? bias,"
        " ScalarType dtype, str activation) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
