"""``quarot::append_dequantize``: what ``quarot::append`` does, and what a prompt reads: the numbers that are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.append import CODE_FLIPS, PARAMETERS, append_rows, check_rows, inputs
from quarot_fx.ops.declaration import HALF_TOLERANCE, OpDeclaration, declare
from quarot_fx.ops.dequantize import dequantize


def _reference(codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Store x in a cache as ``quarot::append`` does, and return its codes as numbers, contiguous, in the dtype of x."""
    return dequantize(*append_rows(codes, scale, zero, x, *rest), x.dtype)


def _fake(codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor, *rest: Any) -> Tensor:
    check_rows(codes, scale, zero, x, *rest)
    return x.new_empty(x.shape)


append_dequantize = declare(
    OpDeclaration(
        schema=f"append_dequantize({PARAMETERS}) -> Tensor",
        reference=_reference,
        fake=_fake,
        inputs=inputs,
        is_traceable=False,  # it writes
        tolerance={torch.float32: 1e-5, **HALF_TOLERANCE},
        code_flips=CODE_FLIPS,
    )
)
