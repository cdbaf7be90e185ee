"""Clip ratios of a weight that is rounded to nearest, by what rounding changes in the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.config import QuantScheme
from quarot_fx.ops.affine import decode, encode, group_count, split_groups, weight_scale_and_zero

# Of many bits only ratios near 1 are of use, and where few directions hold most of the inputs, each of them is another
# chance that errors cancel there: steps are fine from 1.000 to 0.805, and coarse from 0.80 to 0.22.
OUTPUT_RATIOS = (*(1 - step / 200 for step in range(40)), *(0.8 - step / 50 for step in range(30)))


def search_output_clip(weight: Tensor, hessian: Tensor, scheme: QuantScheme) -> Tensor:
    """Find the ratios that minimise ``e H e^T`` of every row, for ``e = w - Q(w)``.

    The groups of a row are gone through once, from no clipping on: each gets the best ratio beside the errors of all
    others, so that every step can only lower the error of the whole row.

    Args:
        weight: [rows, n].
        hessian: of the n inputs.
        scheme: bits, group and symmetry.

    Returns:
        [rows, groups]: the largest of equally good ratios.
    """
    count = group_count(weight, scheme.group)
    groups, blocks = split_groups(weight, count), torch.arange(weight.shape[1], device=weight.device).view(count, -1)
    hessian = hessian.to(weight.dtype)
    ratios = weight.new_ones(len(weight), count)
    errors = groups - rounded_at(groups, scheme, 1.0)
    products = errors.flatten(1) @ hessian
    for group, columns in enumerate(blocks):
        own = hessian[columns[:, None], columns]
        others = products[:, columns] - errors[:, group] @ own
        before, best = errors[:, group], errors[:, group]
        least = _change(best, own, others)
        for ratio in OUTPUT_RATIOS[1:]:
            error = groups[:, group] - rounded_at(groups[:, group], scheme, ratio)
            change = _change(error, own, others)
            is_better = change < least
            least = torch.where(is_better, change, least)
            best = torch.where(is_better[:, None], error, best)
            ratios[:, group] = torch.where(is_better, ratio, ratios[:, group])
        products += (best - before) @ hessian[columns]
    return ratios


def rounded_at(rows: Tensor, scheme: QuantScheme, ratio: float) -> Tensor:
    """Return [..., n] rounded to nearest, with one scale for the last axis that clips it at a ratio."""
    scale, zero = weight_scale_and_zero(rows, scheme.bits, None, ratio, scheme.symmetric)
    return decode(encode(rows, scale, zero, scheme.bits), scale, zero, rows.dtype)


def _change(error: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Return what a group's error [rows, group] adds to the error of its row, beside the products of the others'."""
    return ((error @ own + 2 * others) * error).sum(-1)
