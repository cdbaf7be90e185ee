"""Kernels that end in a quantisation, by the bytes that they must move, against a copy of the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quarot_fx.bench.matmul import SCHEME
from quarot_fx.bench.record import FusedTime
from quarot_fx.bench.timing import copies, microseconds
from quarot_fx.lowering.triton.append import append
from quarot_fx.lowering.triton.append_dequantize import append_dequantize
from quarot_fx.lowering.triton.append_pair import append_pair
from quarot_fx.lowering.triton.norm_quantize import norm_quantize
from quarot_fx.lowering.triton.quantize_activation import quantize_activation
from quarot_fx.lowering.triton.rope_rotate import rope_rotate
from quarot_fx.lowering.triton.rotate_quantize import rotate_quantize
from quarot_fx.ops.balance import random_balance

HEAD = 128
HIDDEN_WIDTHS = (4096, 8192)
WIDTHS = (*HIDDEN_WIDTHS, 14336, 28672)


def measure_fused(widths: Sequence[int], rows: Sequence[int]) -> Iterator[FusedTime]:
    """Measure each kernel for each shape, bfloat16 to codes of 4 bits in a byte each."""
    for width in widths:
        for count in rows:
            shape = (count, width)
            inputs = copies(lambda: torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16))  # noqa: B023
            out = torch.empty_like(inputs[0])
            copy = 2 * out.nbytes / microseconds(out.copy_, inputs)
            for name, (kernel, bytes_per_element) in _kernels(width, count).items():
                time = microseconds(kernel, inputs)
                rate = count * width * bytes_per_element / time
                yield FusedTime(name, count, width, time, rate / 1e3, rate / copy)


def _kernels(width: int, rows: int) -> dict[str, tuple[Callable[[Tensor], Any], float]]:
    """Return kernels of a pair of activations, with the bytes that each must move for an element."""
    whole = f"hadamard-{width}"
    kernels: dict[str, tuple[Callable[[Tensor], Any], float]] = {
        "quantise": (lambda pair: quantize_activation(pair[0], *SCHEME), 3),
        "norm, quantise": (lambda pair: norm_quantize(pair[0], None, None, None, 1e-5, *SCHEME), 3),
        "add, norm, quantise": (lambda pair: norm_quantize(pair[0], pair[1], None, None, 1e-5, *SCHEME), 7),
        "silu, gate, Hadamard, quantise": (
            lambda pair: rotate_quantize(pair[0], pair[1], "silu", whole, 1, *SCHEME),
            5,
        ),
        "Hadamard, quantise": (lambda pair: rotate_quantize(pair[0], None, "identity", whole, 1, *SCHEME), 3),
    }
    if width not in HIDDEN_WIDTHS:
        return kernels
    heads = width // HEAD
    angles = torch.rand(1, rows, HEAD, device="cuda", dtype=torch.bfloat16)

    rotation, balance = f"hadamard-{HEAD}", random_balance(8, HEAD, torch.Generator())
    cache, other = (
        (
            torch.empty(1, heads, rows, HEAD // 2, device="cuda", dtype=torch.uint8),
            torch.empty(1, heads, rows, 1, device="cuda"),
            torch.empty(1, heads, rows, 1, device="cuda", dtype=torch.uint8),
        )
        for _ in range(2)
    )
    position, stored = torch.arange(rows, device="cuda"), sum(tensor.nbytes for tensor in cache) / (rows * width)

    def by_head(x: Tensor) -> Tensor:
        return x.view(1, rows, heads, HEAD).transpose(1, 2)

    def rope(pair: Tensor, of_queries: str | None = None) -> Tensor:
        return rope_rotate(by_head(pair[0]), angles, angles, rotation, of_queries, of_queries is not None)

    def keys(pair: Tensor, of_keys: str | None = None) -> None:
        append(*cache, by_head(pair[0]), position, angles, angles, of_keys, rotation, 4, None, 0.95)

    def values(pair: Tensor) -> None:
        append(*cache, by_head(pair[0]), position, None, None, None, None, 4, None, 0.95)

    def keys_and_values(pair: Tensor) -> None:
        k, v = by_head(pair[0]), by_head(pair[1])
        of_both = (4, 4, None, None, 0.95, 0.95)
        append_pair(*cache, *other, k, v, position, angles, angles, None, None, rotation, None, *of_both)

    def values_of_prompt(pair: Tensor) -> Tensor:
        return append_dequantize(*cache, by_head(pair[0]), position, None, None, None, None, 4, None, 0.95)

    def across_heads(pair: Tensor) -> Any:
        return rotate_quantize(pair[0], None, "identity", f"hadamard-{heads}", HEAD, *SCHEME)

    return kernels | {
        "Hadamard across heads, quantise": (across_heads, 3),
        "RoPE, Hadamard": (rope, 4),
        "RoPE, balance, Hadamard": (partial(rope, of_queries=balance), 4),
        "RoPE, Hadamard, quantise, append": (keys, 2 + stored),
        "RoPE, balance, Hadamard, quantise, append": (partial(keys, of_keys=balance), 2 + stored),
        "quantise, append": (values, 2 + stored),
        "both of these, of keys and values": (keys_and_values, 2 * (2 + stored)),
        "quantise, append, dequantise": (values_of_prompt, 4 + stored),
    }
