"""INT4 matrix products of many tokens on Hopper: a warp that loads, and groups of warps that unpack and multiply.

A program stays on its multiprocessor and takes tile after tile of ``W X^T``. One warp fills a ring of stages by TMA, in
which a stage waits for nothing but being emptied; two groups of four warps share its codes of tokens, and each has
weights of its own. While one unpacks or stores, the other multiplies, and the next tile is loaded already. This is
Gluon, which says who does what and has no interpreter: anywhere else ``int_matmul`` computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.epilogue import finished
from quarot_fx.lowering.triton.language import let_dependents_start, wait_for_inputs
from quarot_fx.lowering.triton.packed_codes import high_codes_times_16, low_codes_times_16
from quarot_fx.ops.pack_weight import NIBBLE_OFFSET

GROUPS = gl.constexpr(2)  # of warps that multiply
GROUP_WARPS = gl.constexpr(4)
REGISTERS = gl.constexpr(240)  # of a thread that multiplies; of one that loads the least that there are
LOADER_REGISTERS = gl.constexpr(24)
BLOCK_BYTES = gl.constexpr(128)  # of the weight's layout: see quarot_fx.ops.pack_weight
MOST_COLUMNS = gl.constexpr(128)  # of an instruction
FEWEST_TOKENS = 256  # for which it was measured: few tiles leave multiprocessors idle
ALIGNMENT = 16  # bytes, of what TMA copies
BARRIERS = 1024  # bytes of shared memory, at most, alignment included
# Names that Triton 3.7 and 3.9 have changed:
wait_for_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _place(tile, token_tiles, row_tiles, RASTER: gl.constexpr):
    """Return which tile of tokens and of rows it is: RASTER of tokens for every one of rows in turn."""
    first = tile // (RASTER * row_tiles) * RASTER
    height = gl.minimum(token_tiles - first, RASTER)
    within = tile % (RASTER * row_tiles)
    return first + within % height, within // height


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """Return the stage after this one, and the phase of its barriers."""
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _load(
    x,
    w,
    low_ring,
    high_ring,
    w_ring,
    full,
    empty,
    token_tiles,
    row_tiles,
    WIDTH: gl.constexpr,
    RASTER: gl.constexpr,
):
    """Fill the ring with the codes of tokens that low and high nibbles meet, and each group's rows of the weight."""
    STAGES: gl.constexpr = low_ring.shape[0]
    TOKENS: gl.constexpr = low_ring.shape[1]
    ROWS: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = w_ring.shape[2]
    STEPS_PER_BLOCK: gl.constexpr = BLOCK_BYTES // BLOCK_K
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), token_tiles * row_tiles, gl.num_programs(0)):
        token, row = _place(tile, token_tiles, row_tiles, RASTER)
        token, row = token * TOKENS, row * (GROUPS * ROWS)
        for step in range(gl.cdiv(WIDTH, BLOCK_K)):
            k = step // STEPS_PER_BLOCK * (2 * BLOCK_BYTES) + step % STEPS_PER_BLOCK * BLOCK_K
            mbarrier.wait(empty.index(stage), phase)
            loaded = full.index(stage)
            mbarrier.expect(loaded, (GROUPS * ROWS + 2 * TOKENS) * BLOCK_K)
            for group in gl.static_range(GROUPS):
                rows = w_ring.index(stage * GROUPS + group)
                copy_in(w, [row + group * ROWS, step * BLOCK_K], loaded, rows)
            copy_in(x, [token, k], loaded, low_ring.index(stage))
            copy_in(x, [token, k + BLOCK_BYTES], loaded, high_ring.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _keep_until_here(codes):
    """Keep the registers of codes from other use before: ``wgmma`` reads them until it is waited for."""
    gl.inline_asm_elementwise("// $0 $1", "=r,r", [codes], dtype=gl.int8, is_pure=False, pack=4)


@gluon.jit
def _multiply(
    low_ring,
    high_ring,
    w_ring,
    full,
    empty,
    results,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    y,
    M,
    N,
    token_tiles,
    row_tiles,
    SIZE: gl.constexpr,
    WIDTH: gl.constexpr,
    IMPLIED_ZERO: gl.constexpr,
    ACTIVATION: gl.constexpr,
    RASTER: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Empty the ring, and store a group's part of each tile."""
    STAGES: gl.constexpr = low_ring.shape[0]
    TOKENS: gl.constexpr = low_ring.shape[1]
    ROWS: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = w_ring.shape[2]
    COLUMNS: gl.constexpr = MOST_COLUMNS if TOKENS > MOST_COLUMNS else TOKENS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS, 1], [16, COLUMNS, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    RESULTS: gl.constexpr = results.shape[2]  # of a token
    # Unpacked codes were multiplied by 16. It is taken back, exactly, by the scale if nothing comes before.
    HAS_ZEROS: gl.constexpr = w_zero is not None or x_zero is not None
    UNIT: gl.constexpr = 1 if HAS_ZEROS else 16
    result = results.index(GROUP)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), token_tiles * row_tiles, gl.num_programs(0)):
        token, row = _place(tile, token_tiles, row_tiles, RASTER)
        token, part = token * TOKENS, row * GROUPS + GROUP
        product = gl.zeros([ROWS, TOKENS], gl.int32, PRODUCT)
        for step in range(gl.cdiv(WIDTH, BLOCK_K)):
            mbarrier.wait(full.index(stage), phase)
            packed = w_ring.index(stage * GROUPS + GROUP).load(LEFT)
            low, high = low_codes_times_16(packed), high_codes_times_16(packed)
            low_codes, high_codes = low_ring.index(stage).permute((1, 0)), high_ring.index(stage).permute((1, 0))
            product = warpgroup_mma(low, low_codes, product, use_acc=step > 0, is_async=True)
            product = warpgroup_mma(high, high_codes, product, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            _keep_until_here(low)
            _keep_until_here(high)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _next(stage, phase, STAGES)
        if HAS_ZEROS:
            product = product >> 4
        value = finished(
            product,
            token + gl.arange(0, TOKENS, gl.SliceLayout(0, PRODUCT)),
            part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, PRODUCT)),
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
            y.dtype,
            SIZE,
            IMPLIED_ZERO,
            IMPLIED_ZERO,
            UNIT,
            0,
            0,
            ACTIVATION,
        )
        tma.store_wait(0)  # for the last tile: its memory is wanted
        wait_for_threads()
        result.store(value.to(y.dtype).permute((1, 0)))
        fence_async_shared()
        copy_out(y, [token, part * RESULTS], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _int_matmul_hopper(
    x,
    w,
    x_scale,
    x_zero,
    x_sum,
    w_scale,
    w_zero,
    w_sum,
    bias,
    residual,
    y,
    M,
    N,
    SIZE: gl.constexpr,
    WIDTH: gl.constexpr,
    IMPLIED_ZERO: gl.constexpr,
    ACTIVATION: gl.constexpr,
    RASTER: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Multiply in tiles of the blocks of ``x`` and ``w``, which are descriptors, as ``y`` is."""
    TOKENS: gl.constexpr = x.block_shape[0]
    ROWS: gl.constexpr = w.block_shape[0]
    BLOCK_K: gl.constexpr = w.block_shape[1]
    token_tiles, row_tiles = gl.cdiv(M, TOKENS), gl.cdiv(N, GROUPS * ROWS)
    low_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, BLOCK_K], x.layout)
    high_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, BLOCK_K], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * GROUPS, ROWS, BLOCK_K], w.layout)
    results = gl.allocate_shared_memory(y.dtype, [GROUPS, y.block_shape[0], y.block_shape[1]], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    wait_for_inputs(EARLY)
    let_dependents_start(EARLY)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    low_ring, high_ring, w_ring, full, empty, results,
                    x_scale, x_zero, x_sum, w_scale, w_zero, w_sum, bias, residual, y,
                    M, N, token_tiles, row_tiles, SIZE, WIDTH, IMPLIED_ZERO, ACTIVATION, RASTER, 0,
                ),
            ),
            (
                _multiply,
                (
                    low_ring, high_ring, w_ring, full, empty, results,
                    x_scale, x_zero, x_sum, w_scale, w_zero, w_sum, bias, residual, y,
                    M, N, token_tiles, row_tiles, SIZE, WIDTH, IMPLIED_ZERO, ACTIVATION, RASTER, 1,
                ),
            ),
            (_load, (x, w, low_ring, high_ring, w_ring, full, empty, token_tiles, row_tiles, WIDTH, RASTER)),
        ],
        [GROUP_WARPS, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def fits(codes: Tensor, scale: Tensor, weight_scale: Tensor, weight_bits: int, y: Tensor) -> bool:
    """Return whether the kernel can make y of these operands of ``quarot::int_linear`` or ``gated_int_linear``."""
    if not describe(codes.device).has_wgmma or codes.dtype != torch.int8 or weight_bits != 4:
        return False
    is_grouped = scale.shape[-1] > 1 or weight_scale.shape[-1] > 1
    return not is_grouped and not any(size % ALIGNMENT for size in (codes.shape[-1], y.shape[-1] * y.itemsize))


def int_matmul_hopper(
    codes: Tensor,
    weight: Tensor,
    operands: tuple[Tensor | None, ...],
    y: Tensor,
    activation: str | None,
    launch: dict[str, Any],
) -> None:
    """Multiply what ``fits``; ``operands`` are the kernel's from ``x_scale`` to ``residual``.

    ``launch`` gives the tile BLOCK_N x BLOCK_M x BLOCK_K of both groups together, RASTER, and at most how many STAGES.
    """
    device = describe(codes.device)
    size, results, (rows, width) = codes.shape[-1], y.shape[-1], weight.shape
    tokens, block_n, block_m, block_k = codes.numel() // size, *(launch[f"BLOCK_{axis}"] for axis in "NMK")
    result_block = [block_m, block_n // GROUPS.value * results // rows]
    free_bytes = device.shared_bytes - BARRIERS - GROUPS.value * result_block[0] * result_block[1] * y.itemsize
    _int_matmul_hopper[(min(triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n), device.multiprocessors),)](
        _described(codes.view(tokens, size), [block_m, block_k]),
        _described(weight, [block_n // GROUPS.value, block_k]),
        *operands,
        _described(y.view(tokens, results), result_block),
        tokens,
        rows,
        SIZE=size,
        WIDTH=width,
        IMPLIED_ZERO=NIBBLE_OFFSET,
        ACTIVATION=activation,
        RASTER=launch["RASTER"],
        STAGES=min(launch["STAGES"], free_bytes // ((block_n + 2 * block_m) * block_k)),
        EARLY=device.starts_early,
        launch_pdl=device.starts_early,
        num_warps=GROUP_WARPS.value,
    )


def _described(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """Return what TMA copies blocks by, swizzled as tensor cores and ``stmatrix`` want them in shared memory."""
    layout = gl.NVMMASharedLayout(min(128, block[1] * matrix.itemsize), 8 * matrix.itemsize, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)
