"""What an online Hadamard transform costs: the way into and through a down projection, with it and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quarot_fx.bench.matmul import SCHEME, Quantized, measure_bfloat16
from quarot_fx.bench.record import HadamardTime
from quarot_fx.bench.timing import microseconds
from quarot_fx.lowering.triton.rotate_quantize import rotate_quantize

SHAPES = ((4096, 14336), (8192, 28672))
TOKENS = (2048, 4096, 8192)


def measure_hadamards(
    shapes: Sequence[tuple[int, int]] = SHAPES, tokens: Sequence[int] = TOKENS
) -> Iterator[HadamardTime]:
    """Measure each [rows, columns] of a weight for each number of tokens."""
    for rows, columns in shapes:
        inputs = {m: torch.randn(2, m, columns, device="cuda", dtype=torch.bfloat16) for m in tokens}
        bfloat16 = measure_bfloat16(rows, columns, {m: x for m, (x, _) in inputs.items()})
        layer = Quantized(rows, columns)
        for m, (x, gate) in inputs.items():
            plain, rotated = (_times(layer, x, gate, *rotation(columns)) for rotation in (identity, whole_row))
            yield HadamardTime(rows, columns, m, bfloat16[m], plain[0], rotated[0], plain[1], rotated[1])


def whole_row(columns: int) -> tuple[str, int]:
    """Return the Hadamard transform of a row, as the kernel takes it."""
    return f"hadamard-{columns}", 1


def identity(columns: int) -> tuple[str, int]:
    """Return the transform that does nothing, which the same kernel does with no matrix."""
    return "hadamard-1", columns


def _times(layer: Quantized, x: Tensor, gate: Tensor, rotation: str, inner: int) -> tuple[float, float]:
    """Return what the quantisation takes, and what it takes with the product."""

    def quantize() -> tuple[Tensor, ...]:
        return rotate_quantize(x, gate, "silu", rotation, inner, *SCHEME)

    alone = microseconds(lambda weight: quantize(), layer.weights)
    return alone, microseconds(lambda weight: layer.multiply(quantize(), weight), layer.weights)
