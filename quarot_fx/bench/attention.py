"""Attention of one query a sequence to a cache, by the bytes of its keys and values, against PyTorch's kernels."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quarot_fx.bench.record import AttentionTime
from quarot_fx.bench.timing import copies, microseconds
from quarot_fx.lowering.triton.attend import attend

HEADS, KEY_VALUE_HEADS, HEAD = 32, 8, 128
SEQUENCES = (1, 16)
CACHES = ((1, 2048), (1, 32768), (16, 2048), (16, 8192), (16, 32768))  # sequences, and keys of each
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SCALE = HEAD**-0.5


def measure_attention(caches: Sequence[tuple[int, int]] = CACHES) -> Iterator[AttentionTime]:
    """Measure each cache in bfloat16: without a mask, with one that hides nothing, and with one that hides half."""
    for batch, keys in caches:
        q = torch.randn(batch, HEADS, 1, HEAD, device="cuda", dtype=torch.bfloat16)
        shape = (2, batch, KEY_VALUE_HEADS, keys, HEAD)
        pairs = copies(lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16))  # noqa: B023
        for attended in (None, keys, keys // 2):
            mask = None if attended is None else _mask(q, keys, attended)
            theirs, backend = _pytorch(q, pairs, mask)
            time = microseconds(lambda pair: attend(q, *pair, mask, SCALE), pairs)  # noqa: B023
            read = pairs[0].nbytes * (attended or keys) // keys
            yield AttentionTime(batch, keys, attended, time, read / time / 1e3, theirs, backend)


def _mask(q: Tensor, keys: int, attended: int) -> Tensor:
    """Return the mask of a cache that is longer than what it holds, [batch, 1, 1, keys]."""
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
