"""What is appended to a cache, as kernels take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Appended:
    """What is appended to a cache: the arguments of ``quarot::append``.

    Attributes:
        y: where the numbers that the codes stand for are stored as well, if anywhere.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    x: Tensor
    position: Tensor
    cos: Tensor | None
    sin: Tensor | None
    rotation: str | None
    bits: int
    group: int | None
    clip: float
    y: Tensor | None = None

    def arguments(self, matrix_of: Callable[..., tuple[Tensor, float]]) -> tuple[Any, ...]:
        """Return what a program is told when it runs, which multiplies with such a matrix."""
        _, heads, tokens, size = self.x.shape
        x = self.x if self.x.stride(-1) == 1 else self.x.contiguous()
        matrix, norm = (None, 1.0) if self.rotation is None else matrix_of(self.rotation, size, x.device, x.dtype)
        cos, sin, stride_angles = self.cos, self.sin, 0
        if cos is not None and sin is not None:
            cos, sin = cos.contiguous(), sin.contiguous()
            stride_angles = 0 if len(cos) == 1 else tokens * size
        codes = self.words
        return (
            x, cos, sin, matrix, self.position, codes, self.scale, self.zero, self.y,
            heads, tokens, tokens - len(self.position), self.codes.shape[2], norm, self.clip,
            *x.stride()[:3], stride_angles, *codes.stride()[:3], *self.scale.stride()[:3], *self.zero.stride()[:3],
        )  # fmt: skip

    @property
    def words(self) -> Tensor:
        """The codes of the cache in words of 32 bits, if a row is some, else in bytes."""
        is_of_words = not any(n % 4 for n in (*self.codes.stride()[:-1], self.codes.storage_offset()))
        return self.codes.view(torch.int32) if is_of_words and self.codes.shape[-1] % 4 == 0 else self.codes
