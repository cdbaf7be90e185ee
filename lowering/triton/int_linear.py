"""``quarot::int_linear`` by the kernel that fits the number of tokens: ``int_gemv`` or ``int_matmul``.

Of many tokens on Hopper it is ``int_matmul_hopper``, where the tables say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quarot_fx.lowering.triton import tiles
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.int_gemv import _int_gemv
from quarot_fx.lowering.triton.int_matmul import _add_parts, _int_matmul
from quarot_fx.lowering.triton.int_matmul_hopper import FEWEST_TOKENS, fits, int_matmul_hopper
from quarot_fx.ops.pack_weight import NIBBLE_OFFSET

MOST_GEMV_TOKENS = 2


def int_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    sum: Tensor,  # noqa: A002  the schema's name
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    weight_sum: Tensor | None,
    weight_bits: int,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    launch: Mapping[str, Any] | None = None,
    activation: str | None = None,
) -> Tensor:
    """Return what the op declares, or with an ``activation`` what ``gated_int_linear`` does.

    ``launch`` replaces the tile and the launch parameters that the tables give; those of ``int_matmul_hopper`` have
    STAGES of their own.
    """
    size, rows = codes.shape[-1], weight.shape[0]
    results = rows if activation is None else rows // 2
    y = codes.new_empty((*codes.shape[:-1], results), dtype=dtype)
    tokens = y.numel() // results if results else 0
    if tokens == 0:
        return y
    codes = codes.contiguous()
    grouped = scale.shape[-1] > 1 or weight_scale.shape[-1] > 1
    operands = (scale, zero, sum, weight_scale, weight_zero, weight_sum, bias, residual)
    tail = (*(None if operand is None else operand.contiguous() for operand in operands), y)
    kernel = "int_matmul_float8" if codes.dtype == torch.float8_e4m3fn else "int_matmul"
    if tokens <= MOST_GEMV_TOKENS and codes.dtype == torch.int8 and not grouped and size % 4 == 0:
        kernel = "int_gemv"
    elif tokens >= FEWEST_TOKENS and fits(codes, scale, weight_scale, weight_bits, y):
        kernel = "int_matmul_hopper"
    if launch is None:
        launch = tiles.nearest(kernel, codes.device, tokens=tokens, rows=rows, columns=size)
    if kernel == "int_gemv":
        _launch_gemv(codes, weight, tail, weight_bits, activation, dict(launch))
    elif "STAGES" in launch:
        int_matmul_hopper(codes, weight, tail[:-1], y, activation, dict(launch))
    else:
        _launch_matmul(codes, weight, tail, weight_bits, activation, dict(launch))
    return y


def _launch_gemv(
    codes: Tensor,
    weight: Tensor,
    tail: tuple[Any, ...],
    weight_bits: int,
    activation: str | None,
    launch: dict[str, Any],
) -> None:
    size, (rows, width) = codes.shape[-1], weight.shape
    early = describe(codes.device).starts_early
    grid = (codes.numel() // size, triton.cdiv(rows, launch["BLOCK_N"]))
    words = (codes.view(torch.int32), weight.view(torch.int32))
    constants = {"W_BITS": weight_bits, "PREFETCHED": launch["BLOCK_K"], "EARLY": early, "launch_pdl": early} | launch
    _int_gemv[grid](*words, *tail, rows, X_WORDS=size // 4, W_WORDS=width // 4, ACTIVATION=activation, **constants)


def _launch_matmul(
    codes: Tensor,
    weight: Tensor,
    tail: tuple[Any, ...],
    weight_bits: int,
    activation: str | None,
    launch: dict[str, Any],
) -> None:
    x_scale, w_scale, y = tail[0], tail[3], tail[-1]
    size, results, (rows, width) = codes.shape[-1], y.shape[-1], weight.shape
    tokens, device = codes.numel() // size, describe(codes.device)
    x_group, w_group = (0 if s.shape[-1] == 1 else size // s.shape[-1] for s in (x_scale, w_scale))
    block_k = min(launch.pop("BLOCK_K"), *(group for group in (x_group, w_group, 128) if group))
    block_n, block_m, split = launch.pop("BLOCK_N"), launch.pop("BLOCK_M"), launch.pop("SPLIT_K", 1)
    is_float, early = codes.dtype == torch.float8_e4m3fn, launch.pop("EARLY", True) and device.starts_early
    tma = launch.pop("TMA", device.has_tma) and device.has_tma and size % 16 == 0 and width % 16 == 0
    x: Any = codes.view(tokens, size)
    w: Any = weight
    out: Any = y.view(tokens, results)
    # A tile that is stored by TMA is one piece of shared memory, in its natural order: no thread computes an address.
    tma_store = tma and split == 1 and block_m >= 64 and results * y.itemsize % 16 == 0
    if tma:
        x = TensorDescriptor(x, [tokens, size], [size, 1], [block_m, block_k])
        w = TensorDescriptor(w, [rows, width], [width, 1], [block_n, block_k])
    if tma_store:
        out = TensorDescriptor(out, [tokens, results], [results, 1], [block_m, block_n * results // rows])
    partial = None
    if split > 1:
        whole = not (x_group or w_group or is_float)
        partial = y.new_empty((split, tokens, rows), dtype=torch.int32 if whole else torch.float32)
    implied_zero = NIBBLE_OFFSET if weight_bits == 4 else 0
    subtracted = 0 if is_float else implied_zero  # nibbles are unpacked to signed int8, but to unsigned float8
    zeros = {"IMPLIED_ZERO": implied_zero, "SUBTRACTED": subtracted}
    groups = {"X_GROUP": x_group, "W_GROUP": w_group}
    constants = zeros | groups | {"ACTIVATION": activation, "EARLY": early, "launch_pdl": early}
    grid = (triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n), split)
    _int_matmul[grid](
        x, w, *tail[:-1], out, partial, tokens, rows,
        SIZE=size, WIDTH=width, W_BITS=weight_bits, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, SPLIT_K=split,
        IS_FLOAT=is_float, TMA=tma, TMA_STORE=tma_store, **constants, **launch,
    )  # fmt: skip
    if split > 1:  # a second kernel adds the parts in a fixed order, so that a result is the same in every run
        block_m = min(triton.next_power_of_2(tokens), 16)
        grid = (triton.cdiv(rows, 64), triton.cdiv(tokens, block_m))
        _add_parts[grid](
            partial,
            *tail,
            tokens,
            rows,
            SIZE=size,
            BLOCK_N=64,
            BLOCK_M=block_m,
            SPLIT_K=split,
            num_warps=2,
            **constants,
        )
