"""``quarot::rope_rotate``: the rotary embedding of queries or keys, and what is done to each head after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.balance import balance_rotate, check_fits, random_balance
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def embed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x * cos + half_turn(x) * sin``, computed in float32 and rounded to the dtype of x."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)


def _reference(
    x: Tensor, cos: Tensor, sin: Tensor, rotation: str, balance: str | None = None, inverse: bool = False
) -> Tensor:
    """Return ``rotate(x * cos + half_turn(x) * sin, rotation)`` with ``half_turn([a, b]) = [-b, a]``.

    x is [batch, heads, tokens, head size], of any strides; cos and sin are [batch or 1, tokens, head size]. The
    embedding is computed in float32 and rounded to the dtype of x, and so is its rotation; the result is contiguous.
    With a balance each head is balanced, or with ``inverse`` brought back, before it is rotated.
    """
    return balance_rotate(embed(x, cos, sin), balance, inverse, rotation)


def _fake(
    x: Tensor, cos: Tensor, sin: Tensor, rotation: str, balance: str | None = None, inverse: bool = False
) -> Tensor:
    check_fits(x, balance, rotation)
    return x.new_empty(x.shape)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch, tokens, heads, size, rotation in (
            (2, 5, 3, 64, "hadamard-64"),
            (1, 1, 2, 48, "hadamard-48"),
            (1, 300, 7, 64, "hadamard-32"),
        ):
            x = torch.randn(batch, tokens, heads, size, generator=generator).to(dtype)
            angle = torch.rand(1, tokens, size // 2, generator=generator).repeat(1, 1, 2)
            embedded = x.transpose(1, 2), angle.cos().to(dtype), angle.sin().to(dtype), rotation
            yield embedded
            yield *embedded, random_balance(heads, size, generator)
            yield *embedded, random_balance(1, size, generator), True
    angles = torch.rand(2, 3, 32, generator=generator)
    x = torch.randn(2, 4, 3, 32, generator=generator)
    yield x, angles.cos(), angles.sin(), "hadamard-16"
    yield x, angles.cos(), angles.sin(), "hadamard-16", random_balance(2, 32, generator), True  # two heads each
    yield torch.zeros(1, 2, 0, 32), torch.zeros(1, 0, 32), torch.zeros(1, 0, 32), "hadamard-32"


rope_rotate = declare(
    OpDeclaration(
        schema="rope_rotate(Tensor x, Tensor cos, Tensor sin, str rotation, str? balance=None, bool inverse=False) "
        "-> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
