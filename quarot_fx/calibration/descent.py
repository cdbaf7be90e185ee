"""Cyclic coordinate descent: codes and scales that there are become better ones, each in turn beside all others
(QuantEase, Behdin et al. 2023; CDQuant, Nair and Suggala 2024).

For an error e of a row, a code moves by steps s: the best one lies where ``(e H)_i`` would vanish, or is the nearest to
that. The best scale for codes c is ``w H c^T / c H c^T``. No step can raise ``e H e^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.ops.affine import WEIGHT_SCALE, code_range, decode


def descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    sweeps: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return codes [rows, n] and scales [rows, groups] that make ``tr((W - W') H (W - W')^T)`` smaller, if any do.

    Args:
        weight: [rows, n], float32 or float64: the dtype that all is computed in.
        hessian: H, [n, n], with a positive diagonal, in the same dtype.
        codes: int8 [rows, n], or uint8 where there are zero points.
        scale: bfloat16 [rows, groups].
        zero: uint8 [rows, groups], which stay as they are; ``None`` if codes are symmetric.
        bits: of a code.
        sweeps: how often all codes and then all scales are gone through.
        block_size: columns whose changes are passed on to all others at once. Changes speed only.
    """
    products = hessian @ (weight - decode(codes, scale, zero, weight.dtype)).T  # H e^T, kept up to date: [n, rows]
    columns, scales = codes.T.to(weight.dtype), scale.T.to(weight.dtype)
    zeros = torch.zeros_like(scales) if zero is None else zero.T.to(weight.dtype)
    lowest, highest = code_range(bits, signed=zero is None)
    for _ in range(sweeps):
        _improve_codes(columns, scales, products, hessian, lowest, highest, block_size)
        _improve_scales(columns, scales, zeros, products, hessian)
    return columns.T.to(codes.dtype).contiguous(), scales.T.to(scale.dtype).contiguous()


def _improve_codes(
    columns: Tensor, scales: Tensor, products: Tensor, hessian: Tensor, lowest: int, highest: int, block_size: int
) -> None:
    """Make each code [n, rows] the best one beside all others, once, from the first column to the last."""
    size, group = len(columns), len(columns) // len(scales)
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        own, block = hessian[start:stop, start:stop], products[start:stop].clone()
        changes = torch.empty_like(block)
        for i, curvature in enumerate(own.diagonal().tolist()):
            before, scale = columns[start + i], scales[(start + i) // group]
            after = (before + block[i] / (curvature * scale)).round().clamp(lowest, highest)
            torch.mul(before - after, scale, out=changes[i])
            before.copy_(after)
            block[i + 1 :].addr_(own[i, i + 1 :], changes[i])
        products.addmm_(hessian[:, start:stop], changes)


def _improve_scales(columns: Tensor, scales: Tensor, zeros: Tensor, products: Tensor, hessian: Tensor) -> None:
    """Make each scale [groups, rows] the best one for its codes beside all others, once, as far as it can be stored."""
    group = len(columns) // len(scales)
    for number, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        own = slice(number * group, (number + 1) * group)
        codes = columns[own] - zero
        of_codes = hessian[:, own] @ codes
        slope, curvature = (products[own] * codes).sum(0), (of_codes[own] * codes).sum(0)
        step = (scale + slope / curvature).to(WEIGHT_SCALE).to(scale.dtype) - scale
        is_better = (step * (step * curvature - 2 * slope) < 0) & (step > -scale)
        step = torch.where(is_better, step, 0)
        scale += step
        products.addcmul_(of_codes, step, value=-1)
