"""What a product of integers becomes: zero points out, scales, a bias, a gate or a residual.

For products in any layout, those of Gluon included: nothing here says which thread holds what.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.activations import GATE_ROWS, activate


@triton.jit
def group_scales(x_scale, w_scale, tokens, rows, k, SIZE: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr):
    """Return the scales [BLOCK_N, BLOCK_M] of the groups that k is in; an operand with one group counts as 1 here."""
    k = tl.minimum(k, SIZE - 1)
    scale = tl.full((rows.shape[0], tokens.shape[0]), 1.0, tl.float32)
    if W_GROUP:
        scale *= tl.load(w_scale + rows * (SIZE // W_GROUP) + k // W_GROUP).to(tl.float32)[:, None]
    if X_GROUP:
        scale *= tl.load(x_scale + tokens * (SIZE // X_GROUP) + k // X_GROUP)[None, :]
    return scale


@triton.jit
def _gated(value, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """Return activation(gate) * up, [BLOCK_N / 2, BLOCK_M], of a tile whose rows belong to gate and up in turn.

    A thread has both of a pair where the tensor cores left them: nothing moves.
    """
    in_turn = tl.reshape(value, (value.shape[0] // (2 * GATE_ROWS), 2, GATE_ROWS, value.shape[1]))
    gate, up = tl.split(tl.permute(in_turn, (0, 2, 3, 1)))
    return tl.reshape(activate(gate, ACTIVATION, dtype) * up, (value.shape[0] // 2, value.shape[1]))


@triton.jit
def finished(
    product,
    tokens,
    rows,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    M,
    N,
    dtype: tl.constexpr,
    SIZE: tl.constexpr,
    IMPLIED_ZERO: tl.constexpr,
    SUBTRACTED: tl.constexpr,
    UNIT: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Return what a product [rows, tokens] becomes for a result of this dtype, in float32: zero points are taken out of
    it, it is scaled, a bias is added, and its rows gate each other if there is an ACTIVATION, else a residual is added.

    The product is exact and whole if no operand is grouped, else already scaled by the scales of groups. It is that of
    stored numbers less SUBTRACTED, times UNIT; their zero point is ``w_zero``, or IMPLIED_ZERO.
    """
    GROUPED: tl.constexpr = X_GROUP != 0 or W_GROUP != 0
    GROUP: tl.constexpr = X_GROUP if X_GROUP != 0 else W_GROUP
    GROUPS: tl.constexpr = SIZE // GROUP if GROUPED else 1
    token_at, row_at = tl.minimum(tokens, M - 1), tl.minimum(rows, N - 1)
    if IMPLIED_ZERO != SUBTRACTED or w_zero is not None or x_zero is not None:
        for group in range(GROUPS):
            x_at = token_at * GROUPS + group if X_GROUP else token_at
            w_at = row_at * GROUPS + group if W_GROUP else row_at
            correction = product * 0
            if w_zero is not None:
                origin = (tl.load(w_zero + w_at) - SUBTRACTED).to(product.dtype)
                correction += origin[:, None] * tl.load(x_sum + x_at).to(product.dtype)[None, :]
            elif IMPLIED_ZERO != SUBTRACTED:
                correction += ((IMPLIED_ZERO - SUBTRACTED) * tl.load(x_sum + x_at)).to(product.dtype)[None, :]
            if x_zero is not None:
                w_sums = tl.load(w_sum + row_at * GROUPS + group).to(product.dtype)
                correction += w_sums[:, None] * tl.load(x_zero + x_at).to(product.dtype)[None, :]
            if GROUPED:
                at = group * GROUP
                correction *= group_scales(x_scale, w_scale, token_at, row_at, at, SIZE, X_GROUP, W_GROUP)
            product -= correction
    value = product.to(tl.float32)
    if not GROUPED:
        w_scales = tl.load(w_scale + row_at).to(tl.float32) * (1.0 / UNIT)
        value *= w_scales[:, None] * tl.load(x_scale + token_at)[None, :]
    elif not W_GROUP:
        value *= tl.load(w_scale + row_at).to(tl.float32)[:, None]
    elif not X_GROUP:
        value *= tl.load(x_scale + token_at)[None, :]
    if bias is not None:
        value += tl.load(bias + row_at).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        value = _gated(value, ACTIVATION, dtype)
    elif residual is not None:
        at = tokens.to(tl.int64)[None, :] * N + rows[:, None]
        value += tl.load(residual + at, mask=(tokens < M)[None, :] & (rows < N)[:, None], other=0).to(tl.float32)
    return value
