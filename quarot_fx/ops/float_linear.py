"""``quarot::float_linear``: a linear layer whose weight stays in 16 bits, as an output head's does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x weight^T + bias``, [..., rows], of x [..., n] and the weight [rows, n] in one type."""
    return F.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    def case(n: int, rows: int, dtype: torch.dtype, bias: bool = False, tokens: int = 1) -> tuple[Any, ...]:
        x, weight, addend = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, 1, n), (rows, n), rows)
        )
        return x, weight, addend if bias else None

    for dtype in (torch.bfloat16, torch.float16):
        yield case(512, 20, dtype)
        yield case(600, 131, dtype, bias=True)
        yield case(2048, 48, dtype)
        yield case(512, 131, dtype, tokens=16)
        yield case(600, 20, dtype, bias=True, tokens=3)
    x, weight, _ = case(64, 16, torch.bfloat16)
    yield x[:0], weight, None


float_linear = declare(
    OpDeclaration(
        schema="float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance=HALF_TOLERANCE,
    )
)
