"""Products of 16-bit floats for a few tokens, by tensor cores: ``float_linear`` of more tokens than one.

A program takes rows of the weight a block of columns at a time, of which the next are loaded meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import dot, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.support import MOST_FLOAT_TOKENS


@triton.jit
def _float_linear_tokens(
    x,
    w,
    bias,
    y,
    N,
    tokens,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply BLOCK_N rows of SIZE numbers by all tokens, of which there are TOKENS at most."""
    rows, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_K)
    row_at, is_token = tl.minimum(rows, N - 1), (token < tokens)[None, :]
    w_at = w + row_at.to(tl.int64)[:, None] * SIZE + column[None, :]
    x_at = x + token[None, :] * SIZE + column[:, None]
    sums = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    for start in range(0, SIZE, BLOCK_K):
        if SIZE % BLOCK_K == 0:
            weights, values = tl.load(w_at + start), tl.load(x_at + start, mask=is_token, other=0)
        else:
            is_column = start + column < SIZE
            weights = tl.load(w_at + start, mask=is_column[None, :], other=0)
            values = tl.load(x_at + start, mask=is_column[:, None] & is_token, other=0)
        sums += dot(weights, values, "ieee")
    if bias is not None:
        sums += tl.load(bias + row_at).to(tl.float32)[:, None]
    y_at = y + token[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(y_at, round_to(sums, y.dtype.element_ty), mask=(rows < N)[:, None] & is_token)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, parameters: Mapping[str, Any] | None) -> None:
    """Store the product of x [tokens, n] in y; ``parameters`` replace the launch parameters that the tables give."""
    (rows, size), tokens = weight.shape, y.numel() // weight.shape[0]
    parameters = parameters or tiles.nearest("float_linear_tokens", x.device, rows=rows, columns=size)
    early = describe(x.device).starts_early
    _float_linear_tokens[(triton.cdiv(rows, parameters["BLOCK_N"]),)](
        x, weight, bias, y, rows, tokens,
        SIZE=size, TOKENS=MOST_FLOAT_TOKENS, EARLY=early, launch_pdl=early, **parameters,
    )  # fmt: skip
