"""``rotate_quantize`` of many long rows: a row lies in shared memory while it is rotated.

A row is K x R x 256 (``stacked_slabs``). Warps rotate slabs of 256, and add and subtract R of them, in registers, while
the next are loaded. Then each has columns of its own, which it multiplies with the matrix of K. What comes out waits
for the range as pairs of bfloat16: in float32 a row of 28,672 would fill the registers of a multiprocessor, which two
programs share now, or four of shorter rows, so that some load while others multiply.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from quarot_fx.lowering.triton.activations import activated
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.explicit_layouts import arange, full, jit, multiply_add, relabelled, shared_memory
from quarot_fx.lowering.triton.language import divide_scalars, let_dependents_start, round_to, rounds, wait_for_inputs
from quarot_fx.lowering.triton.pairs import (
    clamped,
    even_of,
    last_bytes,
    last_halves,
    odd_of,
    rounded_pairs,
    sum_of_bytes,
)
from quarot_fx.lowering.triton.quantization import (
    LARGEST,
    ROUND_TO_INTEGER,
    largest_magnitude,
    maximum_or_nan,
    quantization_of_range,
)
from quarot_fx.lowering.triton.stacked_slabs import (
    BLOCK_K,
    SIDE,
    SLAB_SIZE,
    STEP,
    StackedSlabs,
    as_columns,
    as_operand,
    by_thread,
    in_order,
    stacked_layouts,
    stacked_matrices,
)

WARPS_OF_MULTIPROCESSOR = 16
REGISTERS = 128  # of a thread then
SHORTEST = {True: 8192, False: 14336}  # elements of rows that are gated, or not: shorter ones are faster in registers
MOST_BITS = 4  # of codes: others would show that results are rounded to bfloat16
SMALLEST_CLIP = 2**-10  # quotients by a smaller one may not fit 16 bits


@jit
def _rotate_quantize_shared(
    x,
    gate,
    left,
    first,
    second,
    codes,
    scale,
    zero,
    sums,
    rows,
    stride_x,
    stride_gate,
    norm,
    clip,
    K: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    LOADED: tl.constexpr,
    SLABS: tl.constexpr,
    MEMORY: tl.constexpr,
    PRODUCT: tl.constexpr,
    CODES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Take one row after the other of K x R slabs, as many at a time as there are programs."""
    SYMMETRIC: tl.constexpr = zero is None
    SIZE: tl.constexpr = K * R * SLAB_SIZE
    COLUMNS: tl.constexpr = 64 * WARPS  # of a block
    STEPS: tl.constexpr = BLOCK_K // STEP
    memory = shared_memory(tl.bfloat16, (BLOCK_K, R * SLAB_SIZE), MEMORY)
    first_matrix = _load_matrix_of_slabs(first, R * STEP, SLABS)
    second_matrix = _load_matrix_of_slabs(second, R * STEP, SLABS)
    left_matrix = _load_matrix(left, BLOCK_K, PRODUCT)
    slab = arange(R * STEP, gl.SliceLayout(1, LOADED))[:, None]
    k = slab % STEP
    place = (k * R + slab // STEP) * SLAB_SIZE + arange(SLAB_SIZE, gl.SliceLayout(0, LOADED))[None, :]
    word = arange(BLOCK_K, gl.SliceLayout(1, CODES))[:, None] * (R * SLAB_SIZE // 4)
    word += arange(COLUMNS // 4, gl.SliceLayout(0, CODES))[None, :]
    codes = codes.to(tl.pointer_type(tl.int32))
    programs = tl.num_programs(0)
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    values, gates = _load(x, gate, tl.program_id(0), rows, stride_x, stride_gate, k, place, 0, K, R)
    for row in range(rounds(tl.program_id(0)), rounds(rows), rounds(programs)):
        for step in tl.static_range(STEPS):
            slabs = activated(values, None if gate is None else gates, ACTIVATION)
            if step + 1 < STEPS:
                values, gates = _load(x, gate, row, rows, stride_x, stride_gate, k, place, step + 1, K, R)
            slabs = _slabs_rotated(slabs, first_matrix, second_matrix, R, SLABS)
            memory.slice(step * STEP, STEP).store(as_columns(slabs, R, WARPS))
        pairs = ()
        largest, low, high = 0.0, 0.0, 0.0
        for block in tl.static_range(R * SLAB_SIZE // COLUMNS):
            operand = memory.slice(block * COLUMNS, COLUMNS, 1).load(gl.DotOperandLayout(1, PRODUCT, 2))
            none = full((BLOCK_K, COLUMNS), 0, tl.float32, PRODUCT)
            product = multiply_add(left_matrix, operand, none, PRODUCT)
            of_threads = by_thread(product, WARPS)
            largest = maximum_or_nan(largest_magnitude(of_threads), largest)
            if not SYMMETRIC:
                low = tl.minimum(tl.min(of_threads, axis=1), low)
                high = tl.maximum(tl.max(of_threads, axis=1), high)
            even, odd = tl.split(tl.reshape(product, (BLOCK_K, COLUMNS // 2, 2)))
            pairs += (rounded_pairs(even, odd, tl.bfloat16),)  # type: ignore[assignment]
        largest = tl.sum(largest_magnitude(tl.reshape(largest, (1, 32 * WARPS))), axis=0)
        if not SYMMETRIC:
            low, high = tl.min(low, axis=0), tl.max(high, axis=0)
        step_size, zeros, lowest, highest = quantization_of_range(largest, low, high, norm, clip, SYMMETRIC, BITS)
        reciprocal = tl.minimum(divide_scalars(1.0, step_size), LARGEST) * norm
        values, gates = _load(x, gate, row + programs, rows, stride_x, stride_gate, k, place, 0, K, R)
        start = tl.cast(row, tl.int64)
        total = full((BLOCK_K, COLUMNS // 4), 0, tl.int32, CODES)
        for block in tl.static_range(R * SLAB_SIZE // COLUMNS):
            words = _words(pairs[block], reciprocal, ROUND_TO_INTEGER + zeros, lowest, highest, WARPS)
            words = relabelled(words, CODES)
            at = start * (SIZE // 4) + block * (COLUMNS // 4) + word
            tl.store(codes + at, words, mask=word < SIZE // 4)
            total += sum_of_bytes(words)
        total = tl.sum(tl.reshape(total, (BLOCK_K * COLUMNS // 4,)), axis=0)
        tl.store(scale + start, step_size)
        if not SYMMETRIC:
            tl.store(zero + start, zeros.to(tl.int32))
            total -= (BLOCK_K - K) * R * SLAB_SIZE * zeros.to(tl.int32)
        tl.store(sums + start, total)


# -- loading ---------------------------------------------------------------------------------------


@jit
def _load(x, gate, row, rows, stride_x, stride_gate, k, place, step: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """Return what a step takes of a row, zeros from K on, and its gates, or the same twice where there are none."""
    start, first = tl.cast(row, tl.int64), step * STEP
    mask = (k < tl.where(row < rows, K - first, 0)) & (place >= 0)
    values = tl.load(x + start * stride_x + first * R * SLAB_SIZE + place, mask=mask, other=0)
    gates = values
    if gate is not None:
        gates = tl.load(gate + start * stride_gate + first * R * SLAB_SIZE + place, mask=mask, other=0)
    return values, gates


@jit
def _load_matrix(matrix, SIZE: tl.constexpr, product: tl.constexpr):
    """Return a square matrix as the left operand of a product."""
    LAYOUT: tl.constexpr = gl.DotOperandLayout(0, product, 2)
    row, column = arange(SIZE, gl.SliceLayout(1, LAYOUT))[:, None], arange(SIZE, gl.SliceLayout(0, LAYOUT))[None, :]
    return tl.load(matrix + row * SIZE + column)


@jit
def _load_matrix_of_slabs(matrix, COUNT: tl.constexpr, product: tl.constexpr):
    """Return the same matrix for each of COUNT slabs."""
    LAYOUT: tl.constexpr = gl.DotOperandLayout(0, product, 2)
    row = arange(SIDE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    column = arange(SIDE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return tl.load(tl.broadcast_to(matrix + row * SIDE + column, (COUNT, SIDE, SIDE)))


# -- rotation --------------------------------------------------------------------------------------


@jit
def _slabs_rotated(slabs, first, second, R: tl.constexpr, product: tl.constexpr):
    """Return R blocks of slabs [R * n, SLAB] rotated and mixed, as bfloat16 [n, SIDE, SIDE, R]."""
    COUNT: tl.constexpr = slabs.shape[0]
    none = full((COUNT, SIDE, SIDE), 0, tl.float32, product)
    values = round_to(multiply_add(first, as_operand(slabs), none, product), tl.bfloat16)
    values = multiply_add(second, tl.permute(values, (0, 2, 1)), none, product)
    values = tl.permute(tl.reshape(values, (R, COUNT // R, SIDE, SIDE)), (1, 2, 3, 0))
    return round_to(_sums(values, R), tl.bfloat16)


@jit
def _sums(values, R: tl.constexpr):
    """Return the last axis, of R numbers, times Sylvester's matrix."""
    if R == 1:
        result = values
    else:
        n: tl.constexpr = values.shape[0]
        even, odd = tl.split(tl.reshape(values, (n, SIDE, SIDE, R // 2, 2)))
        result = tl.join(_sums(even + odd, R // 2), _sums(even - odd, R // 2))
        result = tl.reshape(result, (n, SIDE, SIDE, R))
    return result


# -- quantisation ----------------------------------------------------------------------------------


@jit
def _words(pairs, reciprocal, origin, lowest, highest, WARPS: tl.constexpr):
    """Return codes of a block of pairs as words, in the order of a row."""
    even = _rounded(even_of(pairs, tl.bfloat16), reciprocal, origin)
    odd = _rounded(odd_of(pairs, tl.bfloat16), reciprocal, origin)
    codes = clamped(last_halves(even, odd), lowest, highest)
    former, latter = tl.split(in_order(codes, WARPS))
    return last_bytes(former, latter)


@jit
def _rounded(values, reciprocal, origin):
    shifted = tl.fma(values, reciprocal, origin)
    return shifted.to(tl.int32, bitcast=True)


# -- launch ----------------------------------------------------------------------------------------


def takes(
    x: Tensor, gate: Tensor | None, bits: int, container: torch.dtype, clip: float, slabs: StackedSlabs | None
) -> bool:
    """Whether the kernel takes rows of x: not a few, nor short ones, nor what would not be in pairs."""
    return (
        slabs is not None
        and describe(x.device).has_pairs
        and container == torch.int8
        and bits <= MOST_BITS
        and clip >= SMALLEST_CLIP
        and x.shape[-1] >= SHORTEST[gate is not None]
        and x.numel() // x.shape[-1] >= programs_of(slabs, x.device)
    )


def programs_of(slabs: StackedSlabs, device: torch.device) -> int:
    """Return how many programs run at a time."""
    return describe(device).multiprocessors * WARPS_OF_MULTIPROCESSOR // slabs.warps


def launch_shared(
    x: Tensor,
    gate: Tensor | None,
    strides: tuple[int, int],
    operand: tuple[Tensor | None, ...],
    slabs: StackedSlabs,
    clip: float,
    activation: str,
    bits: int,
) -> None:
    """Fill codes, scales, zero points, if there are any, and sums of rows of x."""
    early = describe(x.device).starts_early
    _rotate_quantize_shared[(programs_of(slabs, x.device),)](
        x, gate, *stacked_matrices(slabs, x.device), *operand, x.numel() // x.shape[-1], *strides, slabs.norm, clip,
        K=slabs.count, R=slabs.together, WARPS=slabs.warps, **stacked_layouts(slabs), ACTIVATION=activation, BITS=bits,
        EARLY=early, launch_pdl=early, num_warps=slabs.warps, maxnreg=REGISTERS,
    )  # fmt: skip
