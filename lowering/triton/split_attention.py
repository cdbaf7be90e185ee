"""What kernels share that attend to keys in several programs: how keys are dealt, masks, and how parts are combined."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotation_matrices import SMALLEST_BLOCK, power_of_two_from

MOST_SPLITS = 128
COMBINED = 4096  # numbers that a program combines: 32 a thread
SCANNED = 4096  # numbers of a mask that a program looks at together, at most
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_mask(mask_at, stride, keys, is_mask):
    """Load a mask [keys, rows]; where there is none, nothing is attended to."""
    other = 0 if mask_at.dtype.element_ty == tl.int1 else float("-inf")
    return tl.load(mask_at[None, :] + keys[:, None] * stride, mask=is_mask, other=other)


@triton.jit
def added(loaded, IS_BOOLEAN: tl.constexpr):
    """Return what a mask adds to scores, -inf for keys that are not attended to."""
    return tl.where(loaded != 0, 0.0, float("-inf")) if IS_BOOLEAN else loaded.to(tl.float32)


@triton.jit
def exp(x, maximum):
    """Return e^(x - maximum), and zeros where the maximum is that of nothing, -inf."""
    return tl.exp2((x - tl.where(maximum == float("-inf"), 0.0, maximum)) * LOG2_E)


@triton.jit
def quotient(x, total):
    """Return x / total, and zeros where nothing was attended to."""
    return x / tl.where(total == 0, 1.0, total)


def expand_mask(mask: Tensor | None, q: Tensor, keys: int, rows: int) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """Return a mask [batch, heads, queries, keys], how many rows of it differ, 1 or ``rows``, and its strides."""
    if mask is None:
        return None, rows, (0, 0, 0, 0)
    mask = mask.expand(*q.shape[:3], keys)
    is_shared = all(n == 1 or stride == 0 for n, stride in zip(mask.shape[1:3], mask.stride()[1:3], strict=True))
    return mask, 1 if is_shared else rows, mask.stride()


@dataclass(frozen=True)
class Split:
    """How blocks of keys are dealt to programs.

    Attributes:
        programs: that share the keys of a head.
        each: blocks of a program, at most.
    """

    programs: int
    each: int

    def scanned_blocks(self, numbers: int) -> int:
        """Return how many blocks of a mask, of so many numbers each, are looked at together."""
        return min(max(1, SCANNED // numbers), power_of_two_from(self.each, smallest=1))


def split_keys(blocks: int, programs: int) -> Split:
    """Deal blocks to as few programs, of so many at most, as make the longest share no longer."""
    each = triton.cdiv(blocks, max(1, min(programs, MOST_SPLITS)))
    return Split(triton.cdiv(blocks, max(1, each)) or 1, each)


@dataclass(frozen=True)
class Parts:
    """What programs made of their keys, for each query of each head; ``None`` where one program has all keys.

    Attributes:
        mixed: sums of values by their weights, [queries, programs, size].
        maxima: of scores, [queries, programs].
        totals: of weights, [queries, programs].
    """

    mixed: Tensor | None
    maxima: Tensor | None
    totals: Tensor | None

    @classmethod
    def of(cls, y: Tensor, queries: int, programs: int) -> Parts:
        """Return room for the parts of y."""
        if programs == 1:
            return cls(None, None, None)
        maxima, totals = y.new_empty((2, queries, programs), dtype=torch.float32)
        return cls(maxima.new_empty((*maxima.shape, y.shape[-1])), maxima, totals)

    def combine_into(self, y: Tensor) -> None:
        """Store what all programs together made of the keys, if one alone did not."""
        if self.mixed is None:
            return
        queries, programs, size = self.mixed.shape
        combined = power_of_two_from(programs, smallest=1)
        columns = min(power_of_two_from(size), COMBINED // combined)
        early = describe(y.device).starts_early
        _combine[(queries, triton.cdiv(size, columns))](
            self.mixed, self.maxima, self.totals, y, programs, SIZE=size, SPLITS=combined, COLUMNS=columns,
            EARLY=early, launch_pdl=early,
        )  # fmt: skip


@triton.jit
def _combine(
    partial,
    maxima,
    totals,
    y,
    splits,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Combine the parts of one query of one head, the same way in every run."""
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_split, is_column = split < splits, column < SIZE
    at = row * splits + split
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    maximum = tl.load(maxima + at, mask=is_split, other=float("-inf"))
    total = tl.load(totals + at, mask=is_split, other=0)
    mask = is_split[:, None] & is_column[None, :]
    mixed = tl.load(partial + at[:, None] * SIZE + column[None, :], mask=mask, other=0)
    weights = exp(maximum, tl.max(maximum, axis=0))
    result = quotient(tl.sum(mixed * weights[:, None], axis=0), tl.sum(total * weights, axis=0))
    tl.store(y + row * SIZE + column, round_to(result, y.dtype.element_ty), mask=is_column)


@dataclass(frozen=True)
class Rows:
    """Keys, or values, of a cache.

    Attributes:
        numbers: [batch, kv heads, keys, size], or packed codes [batch, kv heads, keys, bytes].
        size: elements of a key.
        bits: of a code; 16 where numbers are not packed.
        scale, zero: of codes, [batch, kv heads, keys, size / group].
    """

    numbers: Tensor
    size: int
    bits: int = 16
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def block(self) -> int:
        """Columns of a program's block, of packed codes two words at least."""
        return power_of_two_from(self.size, SMALLEST_BLOCK if self.bits == 16 else max(SMALLEST_BLOCK, 64 // self.bits))

    @property
    def group(self) -> int:
        """Elements that share a scale."""
        return self.size if self.scale is None else self.size // self.scale.shape[-1]

    def in_place(self) -> Rows:
        """Return the same rows, copied if a kernel could not read them: whole words, with the same strides of scale and
        zero.
        """
        numbers, scale, zero = self.numbers, self.scale, self.zero
        is_aligned = self.bits == 16 or not any(n % 4 for n in (*numbers.stride()[:-1], numbers.storage_offset()))
        if numbers.stride(-1) != 1 or not is_aligned:
            numbers = numbers.contiguous()
        if scale is not None and zero is not None and (scale.stride(-1) != 1 or scale.stride() != zero.stride()):
            scale, zero = scale.contiguous(), zero.contiguous()
        return Rows(numbers, self.size, self.bits, scale, zero)
