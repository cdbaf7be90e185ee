"""Attention of few queries to packed codes, by the kernel of ``attend``: of 4 bits a quarter of bfloat16's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quarot_fx.lowering.triton.attend import Rows, attend_rows


def attend_packed(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    v_size: int,
    launch: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return what the op declares; ``launch`` replaces the launch parameters that the tables give."""
    k = Rows(k_codes, q.shape[-1], k_bits, k_scale, k_zero)
    v = Rows(v_codes, v_size, v_bits, v_scale, v_zero)
    return attend_rows(q, k, v, mask, scale, launch)
