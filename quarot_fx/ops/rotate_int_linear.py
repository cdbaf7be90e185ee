"""``quarot::rotate_int_linear``: a change of basis, quantisation, and a linear layer of integer codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.int_linear import int_linear, random_arguments
from quarot_fx.ops.norm_int_linear import FLIP, WEIGHT_BITS
from quarot_fx.ops.rotate_quantize import rotate_quantize
from quarot_fx.rotation import Rotation


def _reference(
    x: Tensor,
    rotation: str,
    inner: int,
    bits: int,
    clip: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``int_linear`` of ``rotate_quantize(x, rotation, inner)``, x [..., n], without an activation.

    Codes are symmetric, in int8, with one scale a token; those of the weight are symmetric, of 4 bits, with one scale a
    row.

    Raises:
        OptionError: the weight's width is not that of n codes.
        RotationSizeError: the rotation does not fit n.
    """
    codes, scale, _, sums = rotate_quantize(x, None, "identity", rotation, inner, bits, None, clip, True, torch.int8)
    return int_linear(codes, scale, None, sums, weight, weight_scale, None, None, WEIGHT_BITS, bias, residual, dtype)


def _fake(x: Tensor, rotation: str, inner: int, *rest: Any) -> Tensor:
    Rotation.parse(rotation).check_fits(x, -1, inner)
    _, _, weight, _, _, _, dtype = rest
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    def case(
        heads: int, head: int, rows: int, dtype: torch.dtype = torch.bfloat16, bits: int = 4, **how: Any
    ) -> tuple[Any, ...]:
        codes, _, _, _, weight, scale, _, _, _, bias, residual, dtype = random_arguments(
            generator, 1, rows, heads * head, dtype=dtype, **how
        )
        x = torch.randn(codes.shape, generator=generator).to(dtype)
        return x, f"hadamard-{heads}", head, bits, 0.9, weight, scale, bias, residual, dtype

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield case(8, 64, 20, dtype)
        yield case(5, 32, 48, dtype)  # by a Hartley matrix
        yield case(32, 128, 272, dtype, residual=True)
        yield case(40, 64, 64, dtype, bias=True)
    yield case(4, 256, 48, bits=8, bias=True)
    x, _, *rest = case(8, 64, 20)
    yield x, "hadamard-4", *rest  # two blocks
    yield torch.zeros_like(x), "hadamard-8", *rest
    yield x[:0], "hadamard-8", *rest


rotate_int_linear = declare(
    OpDeclaration(
        schema="rotate_int_linear(Tensor x, str rotation, int inner, int bits, float clip, Tensor weight,"
        " Tensor weight_scale, Tensor? bias, Tensor? residual, ScalarType dtype) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), FLIP),
    )
)
