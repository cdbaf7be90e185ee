"""The keys, or the values, of one layer, as they are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from quarot_fx.cache.formats import Format, Parts, QuantizedFormat
from quarot_fx.errors import CacheInputError, GroupSizeError

TOKENS = 2  # the axis of [batch, heads, tokens, ...]


class PackedTensor:
    """A tensor [batch, heads, capacity, size] in a format, that tokens are written to and read from.

    Attributes:
        parts: what the format stores, each [batch, heads, capacity, ...]; for codes of a few bits these are
            codes uint8 [..., ceil(size * bits / 8)], scale float32 [..., size / group] and zero uint8 likewise.
            Empty until :meth:`allocate`.
        size: elements of a vector, ``head_dim``.
        dtype: of what is written and read.
    """

    parts: Parts = ()
    size: int
    dtype: torch.dtype

    def __init__(self, fmt: Format, where: str) -> None:
        self.format = fmt
        self.where = where  # for messages: "the keys of layer 3"

    def allocate(self, like: Tensor, capacity: int) -> None:
        """Make room for vectors like those of a tensor [batch, heads, any, size].

        Raises:
            GroupSizeError: the format's groups do not divide ``size``.
        """
        self.size, self.dtype = like.shape[-1], like.dtype
        if isinstance(self.format, QuantizedFormat) and self.format.group and self.size % self.format.group:
            raise GroupSizeError(option="group", group=self.format.group, size=self.size, where=f"each of {self.where}")
        empty = self.format.pack(self.format.quantize(like[:, :, :0]))  # also makes the constants of the rotation
        # Zeros, because what no token has filled yet is read, too, if with weight 0: it must be finite.
        self.parts = tuple(part.new_zeros((*part.shape[:2], capacity, part.shape[-1])) for part in empty)

    def reserve(self, capacity: int) -> None:
        """Make room for more tokens, after those that there are."""
        more = capacity - self.capacity
        self.replace(lambda part: torch.cat((part, _zeros(part, more)), TOKENS))

    def write(self, quantized: Parts, position: Tensor) -> None:
        """Store what ``format.quantize`` made of tokens, at positions int64 [tokens], in place."""
        for part, new in zip(self.parts, self.format.pack(quantized), strict=True):
            part.index_copy_(TOKENS, position, new)

    def clear(self, position: Tensor) -> None:
        """Make positions int64 [tokens] as they were before anything was written there."""
        for part in self.parts:
            part.index_fill_(TOKENS, position, 0)

    def read(self, length: int | None = None) -> Tensor:
        """Return the first ``length`` tokens, all by default: [batch, heads, length, size]."""
        return self.decode(self.parts if length is None else tuple(p.narrow(TOKENS, 0, length) for p in self.parts))

    def decode(self, packed: Parts) -> Tensor:
        """Return what parts like those of this tensor mean."""
        return self.format.dequantize(self.format.unpack(packed, self.size), self.dtype)

    def reorder(self, index: Tensor) -> None:
        """Let sequence i become what sequence ``index[i]`` is, in place."""
        for part in self.parts:
            part.copy_(part.index_select(0, index.to(part.device)))

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put something else in the place of every part."""
        self.parts = tuple(change(part) for part in self.parts)

    def check_fits(self, x: Tensor) -> None:
        """Check that a tensor [batch, heads, tokens, size] may be written.

        Raises:
            CacheInputError: it differs from what room was made for.
        """
        batch, heads = self.parts[0].shape[:2]
        if x.shape[0] == batch and x.shape[1] == heads and x.shape[-1] == self.size and x.dtype == self.dtype:
            return
        raise CacheInputError(
            where=self.where,
            given=f"{x.dtype} [{x.shape[0]}, {x.shape[1]}, tokens, {x.shape[-1]}]",
            made=f"{self.dtype} [{batch}, {heads}, tokens, {self.size}]",
        )

    @property
    def capacity(self) -> int:
        """Number of tokens that there is room for."""
        return self.parts[0].shape[TOKENS]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(part.nbytes for part in self.parts)

    def dense_nbytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a plain tensor of this shape takes."""
        if not self.parts:
            return 0
        batch, heads, capacity = self.parts[0].shape[:3]
        return batch * heads * capacity * self.size * dtype.itemsize


def lasting_tensors() -> AbstractContextManager[object]:
    """Make tensors that may be written to later, in inference mode or not, whichever mode the caller is in."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _zeros(part: Tensor, tokens: int) -> Tensor:
    return part.new_zeros((*part.shape[:TOKENS], tokens, *part.shape[TOKENS + 1 :]))
