"""``quarot::pack``: codes of 2 to 8 bits as a little-endian stream of bits, without gaps."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quarot_fx.ops.affine import code_range
from quarot_fx.ops.declaration import OpDeclaration, declare


def packed_size(size: int, bits: int) -> int:
    """Return how many bytes hold ``size`` codes: ceil(size * bits / 8)."""
    return (size * bits + 7) // 8


def regroup_bits(x: Tensor, count: int, bits: int, new_bits: int) -> Tensor:
    """Cut every ``count`` fields of ``bits`` bits, lowest first, to fields of ``new_bits``; 64 bits at most.

    [..., n] to int64 [..., ceil(n / count) * (count * bits / new_bits)]; the stream is padded with zeros.
    """
    fields = pad(x, (0, -x.shape[-1] % count)).unflatten(-1, (-1, count))
    shifted = ((fields[..., i].long() & (2**bits - 1)) << (bits * i) for i in range(count))
    word = reduce(operator.or_, shifted)
    new_fields = [(word >> start) & (2**new_bits - 1) for start in range(0, count * bits, new_bits)]
    return torch.stack(new_fields, -1).flatten(-2)


def _reference(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 [..., ceil(n * bits / 8)]; signed codes are stored in two's complement."""
    code_range(bits, signed=False)
    size = packed_size(codes.shape[-1], bits)
    return regroup_bits(codes, 8, bits, 8)[..., :size].to(torch.uint8).contiguous()


def _fake(codes: Tensor, bits: int) -> Tensor:
    code_range(bits, signed=False)
    return codes.new_empty((*codes.shape[:-1], packed_size(codes.shape[-1], bits)), dtype=torch.uint8)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for bits in range(2, 9):
        low, high = code_range(bits, signed=True)
        yield torch.randint(low, high + 1, (3, 21), dtype=torch.int8, generator=generator), bits
        yield torch.randint(0, 2**bits, (2, 2, 16), dtype=torch.uint8, generator=generator), bits
    yield torch.zeros(0, 5, dtype=torch.int8), 4


pack = declare(
    OpDeclaration(schema="pack(Tensor codes, int bits) -> Tensor", reference=_reference, fake=_fake, inputs=_inputs)
)
