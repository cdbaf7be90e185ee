"""Rounding to nearest, with the clip ratios that change the layer's output least."""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.calibration.hessian import Hessian
from quarot_fx.calibration.rounded import Rounded, output_squares
from quarot_fx.calibration.weight_clips import search_output_clip
from quarot_fx.config import QuantScheme
from quarot_fx.ops.affine import decode, encode, weight_scale_and_zero
from quarot_fx.ops.clip_search import search_clip


@torch.no_grad()
def nearest_round(weight: Tensor, hessian: Hessian, scheme: QuantScheme) -> Rounded:
    """Round a matrix to nearest, clipped so that ``tr((W - W') H (W - W')^T)`` is small.

    Without any rows it is clipped so that the weight itself changes least.

    Args:
        weight: [rows, n], float32 or float64: the dtype that all is computed in.
        hessian: of the n inputs.
        scheme: bits, group and symmetry.
    """
    bits, group, matrix = scheme.bits, scheme.group, hessian.matrix
    if hessian.rows:
        ratios = search_output_clip(weight, matrix, scheme)
    else:
        ratios = search_clip(weight, bits, group, scheme.symmetric)
    scale, zero = weight_scale_and_zero(weight, bits, group, ratios, scheme.symmetric)
    codes = encode(weight, scale, zero, bits)
    changes = output_squares(weight - decode(codes, scale, zero, weight.dtype), matrix)
    return Rounded(codes, scale, zero, 0.0, output_squares(weight, matrix), changes, changes)
