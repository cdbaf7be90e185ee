"""What kernels share whose programs make the codes of one token, each for itself, and multiply rows of a weight.

A kernel of its own for these codes would be mostly latency. Here it is hidden: weights are constant, so that a program
has whole rows of its weight on their way to registers before it waits for the token, and the next ones while it
multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.int_gemv import gated, rows_of_block
from quarot_fx.lowering.triton.packed_codes import dot4, high_codes_of_words_times_16

CODES = tl.constexpr(4)  # in a word of the token's, 8 bits each
UNIT = tl.constexpr(16.0)  # of the weight's codes, in bytes


@triton.jit
def load_rows(w, w_scale, rows, N, column, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """Load rows [BLOCK_N, columns] of the weight and their scales; of no row the last one."""
    if not EVEN:
        rows = tl.minimum(rows, N - 1)
    words_at = w + rows[:, None] * WORDS + column[None, :]
    if column.shape[0] == WORDS:
        words = tl.load(words_at)
    else:
        words = tl.load(words_at, mask=(column < WORDS)[None, :], other=0)
    return words, tl.load(w_scale + rows)


@triton.jit
def multiply_rows(
    words,
    w_scales,
    low_codes,
    high_codes,
    step,
    w,
    w_scale,
    bias,
    residual,
    y,
    first,
    N,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Multiply a token's codes [COLUMNS] by rows of BLOCKS blocks from ``first`` on, of which the first is loaded.

    ``low_codes`` meet the low nibbles of a row's words, ``high_codes`` the high ones.
    """
    RATIO: tl.constexpr = 1 if ACTIVATION is None else 2
    N_RESULTS = N // RATIO
    column = tl.arange(0, COLUMNS)
    for index in range(BLOCKS):
        results = (first + index) * (BLOCK_N // RATIO) + tl.arange(0, BLOCK_N // RATIO)
        result_at = tl.minimum(results, N_RESULTS - 1)
        # What the epilogue needs is on its way before the product: later, nothing would be left to hide its latency.
        if bias is not None:
            biases = tl.load(bias + tl.minimum(rows_of_block(first + index, BLOCK_N, ACTIVATION), N - 1))
        if residual is not None:
            residuals = tl.load(residual + result_at)
        if BLOCKS > 1:
            following = rows_of_block(tl.minimum(first + index + 1, first + BLOCKS - 1), BLOCK_N, ACTIVATION)
            next_words, next_scales = load_rows(w, w_scale, following, N, column, WORDS, EVEN)
        products = tl.zeros((BLOCK_N, COLUMNS), tl.int32)
        products = dot4(high_codes_of_words_times_16(words << 4), low_codes[None, :], products)
        products = dot4(high_codes_of_words_times_16(words), high_codes[None, :], products)
        value = tl.sum(products, axis=1).to(tl.float32) * (w_scales.to(tl.float32) * (step / UNIT))
        if bias is not None:
            value += biases.to(tl.float32)
        if ACTIVATION is not None:
            value = gated(value, ACTIVATION, y.dtype.element_ty)
        if residual is not None:
            value += residuals.to(tl.float32)
        tl.store(y + result_at, value.to(y.dtype.element_ty), mask=results < N_RESULTS)
        if BLOCKS > 1:
            words, w_scales = next_words, next_scales


def launch_constants(
    weight: Tensor, columns: int, activation: str | None, launch: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs, and the constants of a kernel whose programs hold ``columns`` words of a row.

    ``launch`` says how many WORDS of the weight a program multiplies at a time, and how many times it does: BLOCKS.
    """
    rows, early = len(weight), describe(weight.device).starts_early
    block_n = max(launch["WORDS"] // columns, 1 if activation is None else 2)
    each = block_n * launch["BLOCKS"]
    return triton.cdiv(rows, each), {
        "WORDS": weight.shape[-1] // 4, "COLUMNS": columns, "BLOCK_N": block_n, "BLOCKS": launch["BLOCKS"],
        "EVEN": rows % each == 0, "num_warps": launch["num_warps"], "EARLY": early, "launch_pdl": early,
    }  # fmt: skip
