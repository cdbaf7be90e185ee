"""``quarot::balance``: each head of keys times a matrix of its own, and of queries times the inverse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.balance import Balance
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.ops.rotate import rotate
from quarot_fx.rotation import Rotation


def balance_rotate(x: Tensor, balance: str | None, inverse: bool, rotation: str | None) -> Tensor:
    """Return ``x A H`` or ``x A^-1 H`` of x [..., heads, tokens, size], without what is ``None``.

    That is one product with one matrix, in the dtype of x as x is.
    """
    if balance is not None:
        return Balance.parse(balance).apply(x, inverse, rotation, rounded=True)
    return x if rotation is None else rotate(x, rotation)


def check_fits(x: Tensor, balance: str | None, rotation: str | None) -> None:
    """Raise what :func:`balance_rotate` raises, from shapes alone."""
    if balance is not None:
        Balance.parse(balance).check_fits(x)
    if rotation is not None:
        Rotation.parse(rotation).check_fits(x)


def random_balance(heads: int, size: int, generator: torch.Generator) -> str:
    """Return the name of a balance that an op is tested with."""
    roots = torch.randn(heads, size, size, dtype=torch.float64, generator=generator)
    return str(Balance.of_matrices(roots @ roots.mT / size + torch.eye(size)))


def _reference(x: Tensor, balance: str, inverse: bool = False) -> Tensor:
    """Return ``x A`` or ``x A^-1`` of x [..., heads, tokens, size]."""
    return Balance.parse(balance).apply(x, inverse)


def _fake(x: Tensor, balance: str, inverse: bool = False) -> Tensor:
    Balance.parse(balance).check_fits(x)
    return x.new_empty(x.shape)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    balance = random_balance(2, 16, generator)
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
