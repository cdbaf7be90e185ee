"""How exactly learning computes: a gradient that rounding makes noisy needs less than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 be multiplied as TF32, and attention's as bfloat16, on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_fast() -> bool:
    """Whether products of float32 may be less exact."""
    return torch.get_float32_matmul_precision() != "highest"
