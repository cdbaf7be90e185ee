"""A search for launch parameters: of matrix products, quantisation included, and of attention of few queries."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from quarot_fx.bench.attention import (
    BITS,
    CACHES,
    HEAD,
    HEADS,
    KEY_VALUE_HEADS,
    attend_cache,
    random_caches,
)
from quarot_fx.bench.matmul import Quantized
from quarot_fx.bench.timing import microseconds
from quarot_fx.lowering.triton.attend_packed import MMA_COLUMNS
from quarot_fx.lowering.triton.device import describe
from quarot_fx.lowering.triton.int_linear import MOST_GEMV_TOKENS
from quarot_fx.lowering.triton.int_matmul_hopper import FEWEST_TOKENS
from quarot_fx.lowering.triton.rotation_matrices import SMALLEST_BLOCK

TOKENS = (1, 2, 16, 32, 64, 128, 256, 512, 1024, 2048)
COMPILERS = 12  # processes
PROGRAMS = (1, 2, 3, 4)  # of attention, on a multiprocessor
WARPS_AND_REGISTERS = ((16, 128), (12, 168), (8, 240))  # of a multiprocessor, and of a thread, that fit
SHOWN = 5  # candidates
Candidate = dict[str, Any]
Table = dict[str, list[dict[str, Any]]]


def tune_matmul(shapes: Sequence[tuple[int, int]], tokens: Sequence[int] = TOKENS) -> Table:
    """Return a table for ``lowering/triton/tables`` with the fastest candidate for each shape and number of tokens."""
    jobs = {(columns, m): candidates(m) for (_, columns), m in itertools.product(shapes, tokens)}
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        works = dict(
            zip(jobs, pool.map(_compilable, *zip(*((*job, c) for job, c in jobs.items()), strict=True)), strict=True)
        )
    table: Table = {"int_gemv": [], "int_matmul": [], "int_matmul_hopper": []}
    for rows, columns in shapes:
        layer = Quantized(rows, columns)
        for m in tokens:
            x = torch.randn(m, columns, device="cuda", dtype=torch.bfloat16)
            best_first = sorted(works[columns, m], key=lambda candidate: _time(layer, x, candidate))
            general = next(candidate for candidate in best_first if "STAGES" not in candidate)
            sizes = {"tokens": m, "rows": rows, "columns": columns}
            table["int_gemv" if m <= MOST_GEMV_TOKENS else "int_matmul"].append({**sizes, "launch": general})
            if m >= FEWEST_TOKENS and describe(x.device).has_wgmma:
                table["int_matmul_hopper"].append({**sizes, "launch": best_first[0]})
    return {kernel: entries for kernel, entries in table.items() if entries}


def candidates(tokens: int) -> list[Candidate]:
    """Return launch parameters that may be the fastest for so many tokens."""
    return list(_gemv() if tokens <= MOST_GEMV_TOKENS else _few(tokens) if tokens <= 128 else _many(tokens))


def _gemv() -> Iterator[Candidate]:
    for block_n, block_k, warps in ((8, 512, 4), (16, 256, 4), (4, 512, 2), (16, 512, 8), (8, 256, 4)):
        yield {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps}


def _few(tokens: int) -> Iterator[Candidate]:
    """Tiles of all tokens, which read the weight once, split along K where rows alone give too few programs."""
    block_m = max(16, tokens)
    for split, (block_n, warps), stages, tma in itertools.product((1, 2, 4), ((32, 2), (64, 4)), (4, 5), (False, True)):
        if stages * (block_n + 2 * block_m) * 128 < 160_000 and not (tma and block_n < 64):
            yield _tile(block_n, block_m, 128, warps, stages, SPLIT_K=split, TMA=tma)
    if tokens >= 64:
        for split in (1, 2, 4):
            yield _tile(128, 64, 64, 4, 4, SPLIT_K=split)
            yield _tile(64, 64, 128, 4, 4, SPLIT_K=split)
            yield _tile(64, 64, 128, 4, 4, SPLIT_K=split, TMA=False)
            yield _tile(128, 128, 64, 4, 3, SPLIT_K=split)


def _many(tokens: int) -> Iterator[Candidate]:
    for raster, stages in itertools.product((8, 16), (3, 4)):
        yield _tile(128, 128, 64, 4, stages, RASTER=raster)
    if tokens <= 512:
        for split in (1, 2, 4):
            yield _tile(128, 64, 64, 4, 4, SPLIT_K=split)
            yield _tile(64, 128, 128, 4, 3, SPLIT_K=split)
            yield _tile(64, 64, 128, 4, 4, SPLIT_K=split)
        for split in (2, 3, 4):
            yield _tile(128, 128, 64, 4, 3, SPLIT_K=split)
    if tokens >= FEWEST_TOKENS and describe(torch.device("cuda")).has_wgmma:
        yield from _of_hopper()


def _of_hopper() -> Iterator[Candidate]:
    for (block_n, block_m), raster in itertools.product(((256, 128), (128, 256), (128, 128), (256, 64)), (4, 8, 16)):
        blocks = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": 64}
        yield blocks | {"RASTER": raster, "STAGES": 5}


def _tile(block_n: int, block_m: int, block_k: int, warps: int, stages: int, **rest: Any) -> Candidate:
    blocks = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k}
    return blocks | {"RASTER": 8} | rest | {"num_warps": warps, "num_stages": stages}


def _compilable(columns: int, tokens: int, tried: list[Candidate]) -> list[Candidate]:
    """Compile candidates, into Triton's cache, and return those that the device has room for."""
    from triton.runtime.errors import OutOfResources

    layer = Quantized(256, columns)
    operand = layer.quantize(torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16))
    works = []
    for candidate in tried:
        try:
            layer.multiply(operand, layer.weights[0], candidate)
        except OutOfResources:
            continue
        works.append(candidate)
    return works


def _time(layer: Quantized, x: torch.Tensor, launch: Candidate) -> float:
    return microseconds(lambda weight: layer.multiply(layer.quantize(x), weight, launch), layer.weights)


# -- attention -------------------------------------------------------------------------------------


def tune_attention(caches: Sequence[tuple[int, int]] = CACHES, bits: Sequence[int] = BITS) -> Table:
    """Return a table with the candidate for each number of bits that is closest to the best of all caches, in the mean;
    of codes, the best for each cache.

    The next ones are printed: a table may want others for reasons that times do not show.
    """
    table: Table = {"attend": [], "attend_packed": []}
    for count in bits:
        launches = [launch for launch in _attention_candidates(count) if _attends(count, launch)]
        columns = [_attention_times(batch, keys, count, launches) for batch, keys in caches]
        of_row = {"row_bytes": HEAD * count // 8}
        if count == 16:
            launch = _closest_to_best(launches, columns, "16 bits")
            table["attend"].append({"queries": SMALLEST_BLOCK, **of_row, "launch": launch})
            continue
        for (batch, keys), column in zip(caches, columns, strict=True):
            launch = _closest_to_best(launches, [column], f"{count} bits, {batch} x {keys} keys")
            of_cache = {**of_row, "heads": batch * KEY_VALUE_HEADS, "keys": keys}
            table["attend_packed"].append({"queries": MMA_COLUMNS, **of_cache, "launch": launch})
    return table


def _closest_to_best(launches: Sequence[Candidate], columns: Sequence[Sequence[float]], name: str) -> Candidate:
    """Return the candidate whose times are closest to the best of each column, in the mean, and print the next ones."""
    ratios = [[time / min(column) for time in column] for column in columns]
    means = [sum(row) / len(row) for row in zip(*ratios, strict=True)]
    best_first = sorted(range(len(launches)), key=means.__getitem__)
    for index in best_first[:SHOWN]:
        shown = ", ".join(f"{column[index]:.1f}" for column in columns)
        print(f"{name}: {launches[index]} takes {shown} us, {means[index]:.3f} of the best")
    return launches[best_first[0]]


def _attention_candidates(bits: int) -> Iterator[Candidate]:
    """Yield launch parameters; a number of programs compiles nothing anew."""
    if bits == 16:
        for (keys, warps, stages), programs in itertools.product([(64, 4, 2), (64, 4, 3), (128, 8, 2)], PROGRAMS):
            yield {"KEYS": keys, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
        return
    for keys, (warps_of_all, registers), warps in itertools.product((16, 32, 64), WARPS_AND_REGISTERS, (2, 4)):
        yield {"KEYS": keys, "PROGRAMS": warps_of_all // warps, "num_warps": warps, "maxnreg": registers}


def _attends(bits: int, launch: Candidate) -> bool:
    """Return whether the device has room for a candidate."""
    from triton.runtime.errors import OutOfResources

    try:
        _attention_times(1, 2048, bits, [launch])
    except OutOfResources:
        return False
    return True


def _attention_times(batch: int, keys: int, bits: int, launches: Sequence[Candidate]) -> list[float]:
    q = torch.randn(batch, HEADS, 1, HEAD, device="cuda", dtype=torch.bfloat16)
    mask = (torch.arange(keys, device="cuda") < keys).expand(batch, 1, 1, keys)
    caches = random_caches(batch, keys, bits)
    return [microseconds(partial(attend_cache, q, mask, bits, launch=launch), caches) for launch in launches]
