"""What is appended to a cache, as kernels take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quarot_fx.lowering.triton.rotation_matrices import HeadMatrices


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
    balance: str | None
    rotation: str | None
    bits: int
    group: int | None
    clip: float
    y: Tensor | None = None

    @property
    def is_multiplied(self) -> bool:
        """Whether heads are balanced or rotated."""
        return self.balance is not None or self.rotation is not None

    def arguments(self, matrices_of: Callable[..., HeadMatrices]) -> tuple[Any, ...]:
        """Return what a program is told when it runs, which multiplies with such matrices."""
        _, heads, tokens, size = self.x.shape
        x = self.x if self.x.stride(-1) == 1 else self.x.contiguous()
        matrix, norm, sharing = None, 1.0, None
        if self.is_multiplied:
            of_heads = matrices_of(size, x.device, x.dtype, self.rotation, self.balance)
            matrix, norm, sharing = of_heads.values, of_heads.norm, of_heads.sharing(heads)
        cos, sin, stride_angles = self.cos, self.sin, 0
        if cos is not None and sin is not None:
            cos, sin = cos.contiguous(), sin.contiguous()
            stride_angles = 0 if len(cos) == 1 else tokens * size
        codes = self.words
        return (
            x, cos, sin, matrix, self.position, codes, self.scale, self.zero, self.y,
            heads, sharing, tokens, tokens - len(self.position), self.codes.shape[2], norm, self.clip,
            *x.stride()[:3], stride_angles, *codes.stride()[:3], *self.scale.stride()[:3], *self.zero.stride()[:3],
        )  # fmt: skip

    @property
    def words(self) -> Tensor:
        """The codes of the cache in words of 32 bits, if a row is some, else in bytes."""
        is_of_words = not any(n % 4 for n in (*self.codes.stride()[:-1], self.codes.storage_offset()))
        return self.codes.view(torch.int32) if is_of_words and self.codes.shape[-1] % 4 == 0 else self.codes
