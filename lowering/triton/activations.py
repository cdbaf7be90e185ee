"""Device functions that apply an activation, and how the rows of a weight whose products gate each other are dealt."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from quarot_fx.lowering.triton.language import INTERPRETED, as_float32, keep, round_to
from quarot_fx.ops.interleave_rows import ROWS

GATE_ROWS = tl.constexpr(ROWS)  # of a weight belong to a gate, then as many to what it multiplies


@triton.jit
def _quotient(x, y):
    """Return x / y up to 2 units in the last place, which takes a third of the instructions of ``/``."""
    return x / y if INTERPRETED else libdevice.fast_dividef(x, y)


@triton.jit
def _times_sigmoid(x, y, dtype: tl.constexpr):
    """Return x / (1 + exp(-y)); for a result of 16 bits by one special instruction, up to 2^-12 x, instead of two."""
    if INTERPRETED or dtype == tl.float32:
        product = x * _quotient(1.0, 1 + tl.exp(-y))
    else:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * y], dtype=tl.float32, is_pure=True, pack=1
        )
        half = 0.5 * x
        product = tl.fma(tanh, half, half)
    return product


@triton.jit
def activate(x, NAME: tl.constexpr, dtype: tl.constexpr):
    """Apply an activation of ``quarot_fx.ops.activations.ACTIVATIONS`` to float32, for a result of a dtype."""
    tl.static_assert(
        NAME == "silu"
        or NAME == "sigmoid"
        or NAME == "relu"
        or NAME == "relu_squared"
        or NAME == "gelu"
        or NAME == "gelu_tanh"
        or NAME == "identity",
        "a kernel lacks this activation",
    )
    if NAME == "silu":
        y = _times_sigmoid(x, x, dtype)
    elif NAME == "sigmoid":
        y = _times_sigmoid(1.0, x, dtype)
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    elif NAME == "relu_squared":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "identity":
        y = x
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    else:
        y = _times_sigmoid(x, 1.5957691216057308 * (x + 0.044715 * x * x * x), dtype)  # 1 + tanh(u) = 2 sigmoid(2u)
    return y


@triton.jit
def load_activated(x_at, gate_at, mask, ACTIVATION: tl.constexpr):
    """Load activation(gate) * x, or activation(x) where there is no gate, rounded to the type of x."""
    values = tl.load(x_at, mask=mask, other=0)
    gates = None if gate_at is None else tl.load(gate_at, mask=mask, other=0)
    return activated(values, gates, ACTIVATION)


@triton.jit
def activated(values, gates, ACTIVATION: tl.constexpr):
    """Return activation(gates) * values, or activation(values) where there are no gates, rounded to their type."""
    dtype: tl.constexpr = values.dtype
    if gates is not None:
        values = round_to(activate(as_float32(gates), ACTIVATION, dtype) * as_float32(values), dtype)
    elif ACTIVATION != "identity":
        values = round_to(activate(as_float32(values), ACTIVATION, dtype), dtype)
    if (gates is not None or ACTIVATION != "identity") and dtype != tl.float32:
        values = keep(values)
    return values
