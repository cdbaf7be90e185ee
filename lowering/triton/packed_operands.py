"""Packed keys and values as operands of ``mma``, straight from memory: which thread loads what, and where it is.

A column of the product of keys and queries may be any channel, if it is the same of both, and a row any key, if weights
and values follow. So each thread loads neighbouring bytes, and unpacks them into the very registers that ``mma`` reads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton.language as tl
from triton.experimental.gluon import language as gl

from quarot_fx.lowering.triton.explicit_layouts import arange, jit, relabelled
from quarot_fx.lowering.triton.packed_codes import halves_as_floats, neighbours_as_floats

Bases = list[list[int]]  # of a layout: where the n-th bit of a register, lane or warp leads


@jit
def places(
    WORDS: tl.constexpr,
    WARPS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    layout: tl.constexpr,
):
    """Return which key and word a number [WARPS, KEYS, WORDS] of a block is of: a thread's first, and how far from it.

    A thread has rows ``r`` to ``r + STEP`` of every eight. Apart, the second is a constant of an instruction.
    """
    word = arange(WORDS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    row = arange(KEYS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    warp = arange(WARPS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    first = warp * KEYS + row % 8 // STEP * STEP * (KEYS // 8)
    further = row % STEP * (KEYS // 8) + row // 8
    return first, further, word


@jit
def load_words(
    codes,
    start,
    limit,
    first,
    further,
    word,
    ROW: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Load words of keys from ``start`` on, [WARPS, KEYS, words]; from ``limit`` and WORDS on there are zeros."""
    at = codes + start.to(tl.int64) * ROW + (first * ROW + word) + further * ROW
    is_word = (further < limit - start - first) & (word < WORDS)
    return tl.load(at, mask=is_word, other=0)


@jit
def of_rows(x, layout: tl.constexpr):
    """Return numbers of keys [WARPS, 8, n] as [WARPS, 8 n, 1]: rows r, r + 8, ... of a product are neighbours."""
    WARPS: tl.constexpr = x.shape[0]
    KEYS: tl.constexpr = 8 * x.shape[2]
    x = tl.reshape(tl.permute(x, (0, 2, 1)), (WARPS, KEYS))
    return relabelled(x, gl.SliceLayout(2, layout))[:, :, None]


@jit
def keys_as_operand(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of words [WARPS, KEYS, words] as the left operand of scores, [WARPS, KEYS, columns]."""
    WARPS: tl.constexpr = words.shape[0]
    KEYS: tl.constexpr = words.shape[1]
    EACH: tl.constexpr = words.shape[2] // 4  # of a thread
    codes = halves_as_floats(words, BITS, dtype)
    codes = tl.reshape(codes, (WARPS, KEYS, 4, EACH // 2, 2, 2, 16 // BITS))
    codes = tl.permute(codes, (0, 1, 3, 5, 6, 2, 4))
    return tl.reshape(codes, (WARPS, KEYS, words.shape[2] * (32 // BITS)))


@jit
def queries_as_operand(q, BITS: tl.constexpr):
    """Return queries [WARPS, rows, elements], in the order of codes, as the right operand, [WARPS, columns, rows]."""
    WARPS: tl.constexpr = q.shape[0]
    ROWS: tl.constexpr = q.shape[1]
    SIZE: tl.constexpr = q.shape[2]
    EACH: tl.constexpr = SIZE * BITS // 128  # words of a thread
    q = tl.reshape(q, (WARPS, ROWS, 4, EACH // 2, 2, 2, 16 // BITS))
    return tl.reshape(tl.permute(q, (0, 3, 4, 6, 2, 5, 1)), (WARPS, SIZE, ROWS))


@jit
def values_as_operand(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of words [WARPS, KEYS, words] as the left operand of what is mixed, [WARPS, rows, KEYS].

    ``element_of`` says which element a row is.
    """
    WARPS: tl.constexpr = words.shape[0]
    KEYS: tl.constexpr = words.shape[1]
    EACH: tl.constexpr = words.shape[2] // 8  # of a thread
    codes = neighbours_as_floats(words, BITS, dtype)
    codes = tl.permute(tl.reshape(codes, (WARPS, KEYS, 8, EACH, 32 // BITS)), (0, 3, 4, 2, 1))
    return tl.reshape(codes, (WARPS, words.shape[2] * (32 // BITS), KEYS))


@jit
def element_of(row, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Return which element of a value a row of ``values_as_operand`` is."""
    CODES: tl.constexpr = 32 // BITS  # of a word
    return (row % 8 * (SIZE // CODES // 8) + row // (8 * CODES)) * CODES + row // 8 % CODES


def _powers(low: int, high: int) -> list[int]:
    """Return low, 2 low, 4 low, ... below high."""
    return [low << i for i in range((high // low).bit_length() - 1)]


@lru_cache
def layouts(rows: int, size: int, k_words: int, v_words: int, warps: int, keys: int) -> dict[str, Any]:
    """Return who holds what of a block: of ``mma``'s operands, for which a warp is 8 x 4 threads."""
    k_each, v_each, q_each = k_words // 4, v_words // 8, size // 4
    of_warps = [[n, 0, 0] for n in _powers(1, warps)]
    of_eights, of_columns = [[0, n, 0] for n in (1, 2, 4)], [[0, n, 0] for n in (2, 4)]

    def linear(
        registers: list[list[int]], lanes: list[list[int]], shape: tuple[int, int]
    ) -> gl.DistributedLinearLayout:
        return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [warps, *shape])

    more_keys = [[0, n, 0] for n in _powers(8, keys)]
    words = [[0, 0, n] for n in _powers(1, v_each)]
    of_values = [*of_columns, *([0, 0, v_each * n] for n in (1, 2, 4))]
    return {
        "PRODUCT": gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8]),
        "Q_LAYOUT": linear(
            [*([0, 0, n] for n in _powers(1, q_each)), *([0, n, 0] for n in _powers(8, rows))],
            [[0, 0, q_each], [0, 0, 2 * q_each], *of_eights],
            (rows, size),
        ),
        "K_LAYOUT": linear(
            [*([0, 0, n] for n in _powers(1, k_each)), *more_keys],
            [[0, 0, k_each], [0, 0, 2 * k_each], *of_eights],
            (keys, k_words),
        ),
        "V_LAYOUT": linear([*words, [0, 1, 0], *more_keys], of_values, (keys, v_words)),
        "V_NEIGHBOURS": linear([[0, 1, 0], *words, *more_keys], of_values, (keys, v_words)),
        "KEY_LAYOUT": linear(
            [[0, 0, n] for n in _powers(1, keys // 8)], [[0, 0, 0], [0, 0, 0], *of_eights], (8, keys // 8)
        ),
        "LINE_LAYOUT": gl.BlockedLayout([1], [32], [warps], [0]),
        "MASK_LAYOUT": gl.BlockedLayout([4, 1], [32, 1], [warps, 1], [0, 1]),
    }
