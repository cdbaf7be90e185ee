"""Attention of one query a sequence to a cache, of bfloat16 or of packed codes, by the bytes that it holds, against
PyTorch's kernels, which read bfloat16.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quarot_fx.bench.record import AttentionTime
from quarot_fx.bench.timing import copies, microseconds, number_of_copies
from quarot_fx.lowering.triton.attend import attend
from quarot_fx.lowering.triton.attend_packed import attend_packed
from quarot_fx.ops.pack import packed_size

HEADS, KEY_VALUE_HEADS, HEAD = 32, 8, 128
SEQUENCES = (1, 16)
CACHES = ((1, 2048), (1, 32768), (16, 2048), (16, 8192), (16, 32768))  # sequences, and keys of each
BITS = (16, 8, 4, 2)  # of keys and values; 16 are bfloat16
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SCALE = HEAD**-0.5


def measure_attention(
    caches: Sequence[tuple[int, int]] = CACHES, bits: Sequence[int] = BITS
) -> Iterator[AttentionTime]:
    """Measure each cache in bfloat16 and in packed codes: without a mask, with one that hides nothing, and with one
    that hides half.
    """
    for batch, keys in caches:
        q = torch.randn(batch, HEADS, 1, HEAD, device="cuda", dtype=torch.bfloat16)
        shape = (2, batch, KEY_VALUE_HEADS, keys, HEAD)
        pairs = copies(lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16))  # noqa: B023
        masks = {attended: _mask(q, keys, attended) for attended in (None, keys, keys // 2)}
        theirs = {attended: _pytorch(q, pairs, mask) for attended, mask in masks.items()}
        del pairs
        for count in bits:
            in_turn = random_caches(batch, keys, count)
            held = _nbytes(in_turn[0])
            for attended, mask in masks.items():
                time = microseconds(partial(attend_cache, q, mask, count), in_turn)
                rate = held * (attended or keys) / keys / time / 1e3
                yield AttentionTime(batch, keys, attended, time, rate, *theirs[attended], count)


def random_caches(batch: int, keys: int, bits: int) -> list[tuple[Tensor, ...]]:
    """Return as many caches as exceed the GPU's: keys and values in bfloat16, or codes, scale and zero of each."""
    first = _random_cache(batch, keys, bits)
    return [first, *(_random_cache(batch, keys, bits) for _ in range(number_of_copies(_nbytes(first)) - 1))]


def _random_cache(batch: int, keys: int, bits: int) -> tuple[Tensor, ...]:
    shape = (batch, KEY_VALUE_HEADS, keys)
    if bits == 16:
        return tuple(torch.randn(*shape, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tensors: list[Tensor] = []
    for _ in range(2):
        codes = torch.randint(0, 256, (*shape, packed_size(HEAD, bits)), device="cuda", dtype=torch.uint8)
        scale = torch.rand(*shape, 1, device="cuda") / 2**bits
        zero = torch.randint(0, 2**bits, scale.shape, device="cuda", dtype=torch.uint8)
        tensors += codes, scale, zero
    return tuple(tensors)


def _nbytes(cache: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in cache)


def attend_cache(
    q: Tensor, mask: Tensor | None, bits: int, cache: tuple[Tensor, ...], launch: Mapping[str, Any] | None = None
) -> Tensor:
    """Attend to one of :func:`random_caches`."""
    if bits == 16:
        return attend(q, *cache, mask, SCALE, launch)
    return attend_packed(q, *cache, mask, SCALE, bits, bits, HEAD, launch)


def _mask(q: Tensor, keys: int, attended: int | None) -> Tensor | None:
    """Return the mask of a cache that is longer than what it holds, [batch, 1, 1, keys]; ``None`` is no mask."""
    if attended is None:
        return None
    return (torch.arange(keys, device=q.device) < attended).expand(len(q), 1, 1, keys)


def _pytorch(q: Tensor, pairs: Sequence[Tensor], mask: Tensor | None) -> tuple[float | None, str | None]:
    """Return the time of PyTorch's fastest kernel, its heads in groups or repeated as models do, and its name."""

    def grouped(pair: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, pair[0], pair[1], attn_mask=mask, enable_gqa=True)

    def repeated(pair: Tensor) -> Tensor:
        keys, values = pair.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=2)
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    times: dict[str, float] = {}
    for backend, call in itertools.product(BACKENDS, (grouped, repeated)):
        # What a kernel says that does not take this differs, and PyTorch warns of it besides.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
            times[f"{backend.name.lower()}, heads {call.__name__}"] = microseconds(call, pairs)
    fastest = min(times, key=lambda name: times[name], default=None)
    return (None, None) if fastest is None else (times[fastest], fastest)
