"""``quarot::append``: new keys or values are balanced, rotated, quantised, packed, and stored in a cache in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.affine import code_range, group_count
from quarot_fx.ops.balance import balance_rotate, check_fits, random_balance
from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.pack import pack, packed_size
from quarot_fx.ops.quantize_asymmetric import quantize_asymmetric
from quarot_fx.ops.rope_rotate import embed

PARAMETERS = (
    "Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) zero, Tensor x, Tensor position, Tensor? cos, Tensor? sin, "
    "str? balance, str? rotation, int bits, int? group, float clip"
)
CODE_FLIPS = 0.02  # of packed bytes: a number that the order of a transform's sums puts between two codes


def append_rows(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    x: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    balance: str | None,
    rotation: str | None,
    bits: int,
    group: int | None,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Store x at ``position`` of a cache, as asymmetric codes of its last axis, and return codes, scale and zero.

    x is [batch, kv heads, tokens, size], of any strides. The cache is ``codes`` uint8 [batch, kv heads, capacity,
    ceil(size bits / 8)], as ``quarot::pack`` packs them, ``scale`` float32 and ``zero`` uint8 [batch, kv heads,
    capacity, size / group]; ``position``, int64 [stored], says where along its third axis each of the last tokens goes:
    of a prompt that is longer than a window, only as many are stored. With cos and sin x is embedded first, as
    ``quarot::rope_rotate`` does it, with a balance balanced, and with a rotation rotated, rounded to its dtype before
    and after.
    """
    if cos is not None and sin is not None:
        x = embed(x, cos, sin)
    x = balance_rotate(x, balance, False, rotation)
    quantized = quantize_asymmetric(x, bits, group, clip)
    first = x.shape[2] - position.shape[0]
    for cache, rows in zip((codes, scale, zero), (pack(quantized[0], bits), *quantized[1:]), strict=True):
        cache.index_copy_(2, position, rows[:, :, first:].to(cache.dtype))
    return quantized


def check_rows(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    x: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    balance: str | None,
    rotation: str | None,
    bits: int,
    group: int | None,
    clip: float,
) -> None:
    """Raise what :func:`append_rows` raises of bits, group, balance and rotation, from shapes alone."""
    code_range(bits, signed=False)
    group_count(x, group)
    check_fits(x, balance, rotation)


def _reference(*args: Any) -> None:
    """Store x in a cache, as :func:`append_rows` says."""
    append_rows(*args)


def inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """Yield a cache, what is appended to it and where, for each way that the kernel may go."""

    def case(
        shape: tuple[int, int, int, int],
        bits: int = 4,
        group: int | None = None,
        clip: float = 0.95,
        rotation: str | None = None,
        balances: int = 0,
        embedded: bool = False,
        dtype: torch.dtype = torch.float32,
        first: int = 2,
    ) -> list[Any]:
        batch, heads, tokens, size = shape
        x = torch.randn(batch, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)
        rows = (batch, heads, tokens + 5)
        codes = torch.randint(0, 256, (*rows, packed_size(size, bits)), dtype=torch.uint8, generator=generator)
        scale = torch.rand(*rows, group_count(x, group), generator=generator)
        zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator)
        angle = torch.rand(1, tokens, size // 2, generator=generator).repeat(1, 1, 2)
        angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if embedded else (None, None)
        balance = random_balance(balances, size, generator) if balances else None
        return [codes, scale, zero, x, torch.arange(tokens) + first, *angles, balance, rotation, bits, group, clip]

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield tuple(case((2, 3, 5, 64), rotation="hadamard-64", embedded=True, dtype=dtype))
        yield tuple(case((2, 4, 5, 64), rotation="hadamard-64", balances=2, embedded=True, dtype=dtype))
        yield tuple(case((1, 2, 1, 128), rotation="hadamard-128", dtype=dtype))
        yield tuple(case((1, 2, 17, 96), 2, 32, dtype=dtype))
    for bits in (2, 3, 4, 8):
        yield tuple(case((2, 1, 3, 48), bits, clip=1.0))
    yield tuple(case((1, 2, 4, 48), rotation="hadamard-48", group=16))
    yield tuple(case((1, 2, 3, 80), 8, rotation="hadamard-80", embedded=True))
    yield tuple(case((1, 1, 3, 32), embedded=True))
    yield tuple(case((1, 3, 1, 48), rotation="hadamard-48", balances=3, group=16))
    yield tuple(case((1, 2, 3, 32), balances=1))
    yield tuple(case((1, 2, 3, 32), balances=2, embedded=True))
    yield tuple(case((1, 2, 3, 5)))  # of the last byte only a part
    yield tuple(case((1, 2, 3, 6), 2))
    codes, scale, zero, x, position, *rest = case((1, 2, 67, 64), rotation="hadamard-64", embedded=True)
    yield codes, scale, zero, x, position[-4:], *rest
    codes, scale, zero, x, position, *rest = case((2, 2, 6, 32), group=16)
    yield codes, scale, zero, torch.zeros_like(x), position, *rest
    yield codes, scale, zero, x.abs() * 1e30, position, *rest  # 0 is outside the values' range
    yield codes, scale, zero, x.contiguous(), position.flip(0), *rest
    angles = torch.rand(2, 6, 32, generator=generator)  # of each sequence
    yield codes, scale, zero, x, position, angles.cos(), angles.sin(), None, "hadamard-16", *rest[4:]
    yield tuple(case((1, 2, 0, 32), rotation="hadamard-32"))
    for dtype in (torch.bfloat16, torch.float16):  # prompts
        yield tuple(case((2, 4, 70, 128), rotation="hadamard-128", embedded=True, dtype=dtype))
        yield tuple(case((1, 4, 66, 64), rotation="hadamard-64", balances=2, embedded=True, dtype=dtype))
        yield tuple(case((1, 2, 65, 128), 4, 32, rotation="hadamard-128", balances=2, dtype=dtype))
        yield tuple(case((1, 3, 64, 128), 8, 32, rotation="hadamard-64", dtype=dtype))
        codes, scale, zero, x, position, *rest = case((1, 2, 130, 64), 2, clip=1.0, dtype=dtype)
        yield codes, scale, zero, x, position[-80:].flip(0), *rest


append = declare(
    OpDeclaration(
        schema=f"append({PARAMETERS}) -> ()",
        reference=_reference,
        fake=check_rows,
        inputs=inputs,
        is_traceable=False,  # it writes
        tolerance={torch.float32: 1e-5},
        code_flips=CODE_FLIPS,
    )
)
