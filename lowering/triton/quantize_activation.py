"""A row of an activation becomes codes: its range, scale, zero point, codes and their sum, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import Device, describe
from quarot_fx.lowering.triton.language import as_float32, let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.quantization import store_quantized
from quarot_fx.lowering.triton.rows import rows_of
from quarot_fx.ops.quantize_activation import fake_operand

ELEMENTS_PER_WARP = 1024
ELEMENTS_PER_HURRIED_WARP = 256  # where each row has a multiprocessor to itself


@triton.jit
def _quantize_activation(
    x,
    codes,
    scale,
    zero,
    sums,
    stride,
    groups,
    group,
    clip,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Quantise a row as [GROUPS, GROUP], the powers of two that hold [groups, group]."""
    row = tl.program_id(0)
    which, place = tl.arange(0, GROUPS), tl.arange(0, GROUP)[None, None, :]
    mask = (which < groups)[:, None, None] & (place < group)
    column = which[:, None, None] * group + place
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    values = as_float32(tl.load(x + row.to(tl.int64) * stride + column, mask=mask, other=0))
    at = row.to(tl.int64) * (groups * group) + column
    store_quantized(
        values, 1.0, codes + at, mask, scale, zero, sums, row * groups + which, which < groups, group, clip, BITS
    )


def quantize_activation(
    x: Tensor, bits: int, group: int | None, clip: float, symmetric: bool, container: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the op declares."""
    operand = fake_operand(x, bits, group, clip, symmetric, container)
    codes, scale, zero, sums = operand
    if x.numel():
        size, groups = x.shape[-1], scale.shape[-1]
        blocks = triton.next_power_of_2(groups), triton.next_power_of_2(size // groups)
        device, rows = describe(x.device), x.numel() // size
        x, stride = rows_of(x)
        _quantize_activation[(rows,)](
            x, codes, scale, None if symmetric else zero, sums, stride, groups, size // groups, clip,
            BITS=bits, GROUPS=blocks[0], GROUP=blocks[1], EARLY=device.starts_early,
            num_warps=warps_for(blocks[0] * blocks[1], rows, device), launch_pdl=device.starts_early,
        )  # fmt: skip
    return operand


def warps_for(elements: int, rows: int, device: Device) -> int:
    """Return the warps of a program that holds so many elements, of one row in so many, in registers."""
    each = ELEMENTS_PER_WARP if rows > device.multiprocessors else ELEMENTS_PER_HURRIED_WARP
    return min(max(elements // each, 1), 16)
