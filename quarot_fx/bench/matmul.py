"""W4A4 matrix products with the quantisation of their input, against cuBLAS in bfloat16 in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quarot_fx.bench.record import MatmulTime
from quarot_fx.bench.timing import copies, microseconds
from quarot_fx.lowering.triton.int_linear import int_linear
from quarot_fx.lowering.triton.quantize_activation import quantize_activation
from quarot_fx.lowering.triton.tiles import Launch
from quarot_fx.ops.affine import WEIGHT_SCALE
from quarot_fx.ops.pack_weight import packed_width

SCHEME = (4, None, 0.9, True, torch.int8)  # of activations under the default options: a row's codes, in a byte each


class Quantized:
    """Random weights of one shape in 4 bits, several of them, and what multiplies by one."""

    def __init__(self, rows: int, columns: int) -> None:
        width = packed_width(columns, 4)
        self.weights = copies(lambda: torch.randint(0, 256, (rows, width), dtype=torch.uint8, device="cuda"))
        self.scale = (torch.rand(rows, 1, device="cuda") * 0.01).to(WEIGHT_SCALE)

    @staticmethod
    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the operand that x becomes under the default options."""
        return quantize_activation(x, *SCHEME)

    def multiply(
        self, operand: tuple[Tensor, ...], weight: Tensor, launch: Launch | None = None, activation: str | None = None
    ) -> Tensor:
        """Return the product, in bfloat16; with an activation, half of it gated by the other half."""
        codes, scale, _, sums = operand
        weights = (weight, self.scale, None, None, 4)
        product = (codes, scale, None, sums, *weights, None, None, torch.bfloat16)
        return int_linear(*product, launch=launch, activation=activation)


def measure_matmuls(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Iterator[MatmulTime]:
    """Measure each shape for each number of tokens."""
    for rows, columns in shapes:
        inputs = {m: torch.randn(m, columns, device="cuda", dtype=torch.bfloat16) for m in tokens}
        plain = measure_bfloat16(rows, columns, inputs)
        layer = Quantized(rows, columns)
        for m, x in inputs.items():
            yield MatmulTime(rows, columns, m, plain[m], *_quantized(x, layer))


def measure_bfloat16(rows: int, columns: int, inputs: Mapping[int, Tensor]) -> dict[int, float]:
    """Return the time of ``torch.mm`` for each input [tokens, columns], by their numbers of tokens."""
    weights = copies(lambda: torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02)
    return {tokens: _bfloat16(x, weights) for tokens, x in inputs.items()}


def _bfloat16(x: Tensor, weights: list[Tensor]) -> float:
    y = x.new_empty(len(x), len(weights[0]))
    return microseconds(lambda weight: torch.mm(x, weight.T, out=y), weights)


def _quantized(x: Tensor, layer: Quantized) -> tuple[float, float, float]:
    operand = layer.quantize(x)
    quantize = microseconds(lambda weight: layer.quantize(x), layer.weights)
    matmul = microseconds(lambda weight: layer.multiply(operand, weight), layer.weights)
    total = microseconds(lambda weight: layer.multiply(layer.quantize(x), weight), layer.weights)
    return quantize, matmul, total
