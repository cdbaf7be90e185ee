"""``quarot::balance``: each head times its own matrix, of keys, and times the inverse, of queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.balance import Balance
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare


def _reference(x: Tensor, balance: str, inverse: bool = False) -> Tensor:
    """Return ``x A`` or ``x A^-1`` of x [..., heads, tokens, size]."""
    return Balance.parse(balance).apply(x, inverse)


def _fake(x: Tensor, balance: str, inverse: bool = False) -> Tensor:
    Balance.parse(balance).check_fits(x)
    return x.new_empty(x.shape)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    roots = torch.randn(2, 16, 16, dtype=torch.float64, generator=generator)
    balance = str(Balance.of_matrices(roots @ roots.mT / 16 + torch.eye(16)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 2, 5, 16, generator=generator).to(dtype)
        yield x, balance
        yield x.repeat(1, 3, 1, 1), balance, True  # queries, of which several share a key
    yield x.transpose(0, 1).contiguous().transpose(0, 1), balance
    yield x[:, :, :0], balance


balance = declare(
    OpDeclaration(
        schema="balance(Tensor x, str balance, bool inverse=False) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
    )
)
