"""Matrix-vector products of 16-bit floats for one token: a few whole rows of the weight for each program.

No tensor core is needed for as much as memory delivers. Those of a few tokens are of ``float_linear_tokens``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton import float_linear_tokens, tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import as_float32, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.rotation_matrices import power_of_two_from


@triton.jit
def _float_linear(
    x,
    w,
    bias,
    y,
    N,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply BLOCK_N rows of SIZE numbers, which COLUMNS hold."""
    rows, column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, COLUMNS)
    row_at = tl.minimum(rows, N - 1)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    weights = tl.load(w + row_at.to(tl.int64)[:, None] * SIZE + column[None, :], mask=(column < SIZE)[None, :], other=0)
    values = as_float32(tl.load(x + column, mask=column < SIZE, other=0))
    result = tl.sum(as_float32(weights) * values[None, :], axis=1)
    if bias is not None:
        result += tl.load(bias + row_at).to(tl.float32)
    tl.store(y + rows, round_to(result, y.dtype.element_ty), mask=rows < N)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, launch: Mapping[str, Any] | None = None) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    rows, size = weight.shape
    y = x.new_empty((*x.shape[:-1], rows))
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    if y.numel() > rows:
        float_linear_tokens.launch(x, weight, bias, y, launch)
    elif y.numel():
        launch = launch or tiles.nearest("float_linear", x.device, rows=rows, columns=size)
        early = describe(x.device).starts_early
        _float_linear[(triton.cdiv(rows, launch["BLOCK_N"]),)](
            x, weight, bias, y, rows,
            SIZE=size, COLUMNS=power_of_two_from(size), EARLY=early, launch_pdl=early, **launch,
        )  # fmt: skip
    return y
