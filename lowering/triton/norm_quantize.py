"""A norm and the quantisation of its result in one pass over the stream, behind an addition where there is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.language import as_float32, let_dependents_start, round_to, wait_for_inputs
from quarot_fx.lowering.triton.quantization import store_quantized
from quarot_fx.lowering.triton.quantize_activation import warps_for
from quarot_fx.lowering.triton.rows import rows_of
from quarot_fx.ops.quantize_activation import fake_operand


@triton.jit
def _norm_quantize(
    x,
    addend,
    direction,
    gain,
    stream,
    codes,
    scale,
    zero,
    sums,
    stride_x,
    stride_addend,
    groups,
    group,
    eps,
    clip,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norm and quantise a row as [GROUPS, 1, GROUP], the powers of two that hold [groups, group]."""
    row = tl.program_id(0)
    which, place = tl.arange(0, GROUPS), tl.arange(0, GROUP)[None, None, :]
    mask = (which < groups)[:, None, None] & (place < group)
    column = which[:, None, None] * group + place
    size = groups * group
    at = row.to(tl.int64) * size + column
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    values = tl.load(x + row.to(tl.int64) * stride_x + column, mask=mask, other=0)
    if addend is not None:
        addends = tl.load(addend + row.to(tl.int64) * stride_addend + column, mask=mask, other=0)
        values = round_to(values.to(tl.float32) + addends.to(tl.float32), values.dtype)
        tl.store(stream + at, values, mask=mask)
    values = as_float32(values)
    if direction is not None:
        axis = tl.load(direction + column, mask=mask, other=0).to(tl.float32)
        values -= tl.sum(values * axis) * axis
    unit = tl.math.rsqrt(tl.sum(values * values) / size + eps)
    if gain is not None:
        values *= tl.load(gain + column, mask=mask, other=0).to(tl.float32)
    store_quantized(
        values, unit, codes + at, mask, scale, zero, sums, row * groups + which, which < groups, group, clip, BITS
    )


def norm_quantize(
    x: Tensor,
    addend: Tensor | None,
    direction: Tensor | None,
    gain: Tensor | None,
    eps: float,
    bits: int,
    group: int | None,
    clip: float,
    symmetric: bool,
    container: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what the op declares."""
    codes, scale, zero, sums = fake_operand(x, bits, group, clip, symmetric, container)
    stream = x.new_empty(0 if addend is None else x.shape)
    if x.numel():
        size, groups = x.shape[-1], scale.shape[-1]
        blocks = triton.next_power_of_2(groups), triton.next_power_of_2(size // groups)
        device, rows = describe(x.device), x.numel() // size
        x, stride_x = rows_of(x)
        addend, stride_addend = (None, 0) if addend is None else rows_of(addend)
        direction, gain = (None if vector is None else vector.contiguous() for vector in (direction, gain))
        _norm_quantize[(rows,)](
            x, addend, direction, gain, stream, codes, scale, None if symmetric else zero, sums,
            stride_x, stride_addend, groups, size // groups, eps, clip,
            BITS=bits, GROUPS=blocks[0], GROUP=blocks[1], EARLY=device.starts_early,
            num_warps=warps_for(blocks[0] * blocks[1], rows, device), launch_pdl=device.starts_early,
        )  # fmt: skip
    return codes, scale, zero, sums, stream
