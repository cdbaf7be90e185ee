"""What it saves to gate in the epilogue of a product: the way through gate and up to the codes that a down projection
reads, with it and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quarot_fx.bench.hadamard import whole_row
from quarot_fx.bench.matmul import SCHEME, Quantized
from quarot_fx.bench.record import GatedTime
from quarot_fx.bench.timing import copies, microseconds
from quarot_fx.lowering.triton.rotate_quantize import rotate_quantize

SHAPES = ((2 * 14336, 4096), (2 * 28672, 8192))
TOKENS = (1, 16, 2048, 8192)
ACTIVATION = "silu"


def measure_gated(shapes: Sequence[tuple[int, int]] = SHAPES, tokens: Sequence[int] = TOKENS) -> Iterator[GatedTime]:
    """Measure each [rows, columns] of a weight of gate and up for each number of tokens."""
    for rows, columns in shapes:
        layer = Quantized(rows, columns)
        for m in tokens:
            x = torch.randn(m, columns, device="cuda", dtype=torch.bfloat16)
            yield GatedTime(rows, columns, m, *_times(layer, x, None), *_times(layer, x, ACTIVATION))


def _times(layer: Quantized, x: Tensor, activation: str | None) -> tuple[float, float, float]:
    """Return what the product takes, what the way from it to codes, and what both; an activation has it gate itself."""
    operand = layer.quantize(x)

    def multiply(weight: Tensor) -> Tensor:
        return layer.multiply(operand, weight, activation=activation)

    def quantize(product: Tensor) -> tuple[Tensor, ...]:
        gate, up = product.chunk(2, -1) if activation is None else (None, product)
        how = "identity" if gate is None else ACTIVATION
        return rotate_quantize(up, gate, how, *whole_row(up.shape[-1]), *SCHEME)

    products = copies(lambda: multiply(layer.weights[0]))
    return (
        microseconds(multiply, layer.weights),
        microseconds(quantize, products),
        microseconds(lambda weight: quantize(multiply(weight)), layer.weights),
    )
