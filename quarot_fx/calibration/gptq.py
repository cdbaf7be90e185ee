"""GPTQ: columns are rounded one after another, and those to come make up for the errors so far (Frantar et al. 2022).

With ``U^T U = H^-1``, U upper triangular, the best that the columns after i can do about an error e of column i is
to change by ``-(e / U_ii) U_i,later``. What comes of that is then improved by coordinate descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quarot_fx.calibration.descent import descend
from quarot_fx.calibration.hessian import Hessian, damped, inverse_factor, upper_factor
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.rounded import Rounded, output_squares
from quarot_fx.config import QuantScheme
from quarot_fx.errors import HessianError
from quarot_fx.ops.affine import WEIGHT_SCALE, decode, encode, group_count, split_groups, weight_scale_and_zero
from quarot_fx.ops.clip_search import search_clip

# What the ratios that change the weight itself least are multiplied by, and infinity for no clipping.
CLIP_FACTORS = (1.0, 1.2, 1.1, 0.9, 0.8, 0.7, float("inf"))
ELEMENTS_AT_ONCE = 2**28


@dataclass(frozen=True)
class _Inputs:
    """What is known of a matrix's inputs.

    Attributes:
        moments: H, [n, n].
        damped: likewise; ``None`` without any rows.
        order: place in the order of rounding -> column; ``None`` is from left to right.
        inverse: U, for the columns in that order.
    """

    moments: Tensor
    damped: Tensor | None
    order: Tensor | None
    inverse: Tensor


@torch.no_grad()
def gptq_round(
    weight: Tensor, hessian: Hessian, scheme: QuantScheme, options: GPTQOptions, name: str = "weight"
) -> Rounded:
    """Round a matrix so that ``tr((W - W') H (W - W')^T)`` is small.

    An input that was 0 in all rows has its weights set to 0, as in GPTQ. Without any rows the matrix is rounded to
    nearest.

    Args:
        weight: [rows, n], float32 or float64: the dtype that all is computed in, but for factorisations, in float64.
        hessian: of the n inputs.
        scheme: bits, group, symmetry and clip ratio: ``"search"``, the one with the least error of the weight, or
            ``"output"``: every row is rounded several times, from less clipping to more, and kept as it changes its
            output least. How rounding to nearest at the same scales would change it says little of that.
        options: of GPTQ.
        name: of the weight, for messages.

    Raises:
        HessianError: the Hessian is not positive definite with the damping allowed.
    """
    matrix = hessian.matrix
    dead = matrix.diagonal() == 0
    if hessian.rows:
        weight = torch.where(dead, 0, weight)
    matrix.diagonal().masked_fill_(dead, 1)
    order = matrix.diagonal().argsort(descending=True, stable=True) if options.act_order else None
    factor, damping = _factor(matrix if order is None else matrix[order][:, order], hessian.rows, options, name)
    if hessian.shifts is not None:
        weight = _towards_target(weight, hessian.shifts, factor, order)
    inputs = _Inputs(
        hessian.matrix.to(weight.dtype),
        damped(matrix, damping).to(weight.dtype) if hessian.rows else None,
        order,
        inverse_factor(factor).to(weight.dtype),
    )
    rounded = _round_at_best_clips if scheme.clip == "output" else _round
    codes, scale, zero = rounded(weight, inputs, scheme, options)
    nearest = encode(weight, scale, zero, scheme.bits)
    changes = (weight - decode(one, scale, zero, weight.dtype) for one in (codes, nearest))
    sums = [output_squares(one, inputs.moments) for one in (weight, *changes)]
    return Rounded(codes, scale, zero, damping, *sums)


def _factor(matrix: Tensor, rows: int, options: GPTQOptions, name: str) -> tuple[Tensor, float]:
    """Return the upper factor of the damped Hessian, and the damping that it took."""
    damping = options.damping
    while True:
        factor = upper_factor(damped(matrix, damping))
        if factor is not None:
            return factor, damping
        larger = 10 * damping or 1e-4
        if options.max_damping is None or larger > options.max_damping:
            break
        damping = larger
    finite = bool(matrix.isfinite().all())
    raise HessianError(
        parameter=name,
        size=len(matrix),
        tokens=rows,
        damping=damping,
        reason="some inputs are linear combinations of others" if finite else "its inputs overflow, or are not numbers",
        remedy="Give more calibration data, raise damping, or give max_damping, up to which it is raised where needed."
        if finite
        else "Calibrate a model in bfloat16 or float32, whose outputs are finite.",
    )


def _towards_target(weight: Tensor, shifts: Tensor, factor: Tensor, order: Tensor | None) -> Tensor:
    """Return the weight that comes closest, on the inputs that there are, to what the given one makes of the inputs
    that should have been: ``W + W D H^-1``, the solution of a ridge regression towards W.
    """
    change = weight.double() @ shifts
    if order is not None:
        change = change[:, order]
    # H = R R^T: two triangular solves from the right.
    change = torch.linalg.solve_triangular(factor.T, change, upper=False, left=False)
    change = torch.linalg.solve_triangular(factor, change, upper=True, left=False)
    if order is not None:
        change = change[:, order.argsort()]
    return weight + change.to(weight.dtype)


def _round_at_best_clips(
    weight: Tensor, inputs: _Inputs, scheme: QuantScheme, options: GPTQOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes, scales and zero points of each row that change its output least, of all ``CLIP_FACTORS``."""
    found = []
    factors = weight.new_tensor(CLIP_FACTORS)
    for part in weight.split(max(1, ELEMENTS_AT_ONCE // (len(factors) * weight.shape[1]))):
        copies = part.repeat(len(factors), 1)  # rows are rounded independently of each other: all at once
        of_copies = factors.repeat_interleave(len(part))[:, None]
        codes, scale, zero = _round(copies, inputs, scheme, options, of_copies)
        changes = output_squares(copies - decode(codes, scale, zero, weight.dtype), inputs.moments)
        best = changes.view(len(factors), -1).argmin(0) * len(part) + torch.arange(len(part), device=weight.device)
        found.append((codes[best], scale[best], zero if zero is None else zero[best]))
    all_codes, scales, zeros = zip(*found, strict=True)
    return torch.cat(all_codes), torch.cat(scales), None if scheme.symmetric else torch.cat(zeros)


def _round(
    weight: Tensor, inputs: _Inputs, scheme: QuantScheme, options: GPTQOptions, clip_factor: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes [rows, n], scale and zero point [rows, groups], improved by as many sweeps as are asked for.

    Args:
        weight: [rows, n].
        inputs: of the weight.
        scheme: of the codes.
        options: of GPTQ.
        clip_factor: of clip ratios that are searched for; one, or [rows, 1].
    """
    codes, scale, zero = _round_columns(weight, inputs, scheme, options, clip_factor)
    if options.sweeps and inputs.damped is not None:
        how = (scheme.bits, options.sweeps, options.block_size)
        codes, scale = descend(weight, inputs.damped, codes, scale, zero, *how)
    return codes, scale, zero


def _round_columns(
    weight: Tensor, inputs: _Inputs, scheme: QuantScheme, options: GPTQOptions, clip_factor: float | Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    order, inverse = inputs.order, inputs.inverse
    size, count = weight.shape[1], group_count(weight, scheme.group)
    places = torch.arange(size, device=weight.device) if order is None else order
    groups = (places // (size // count)).tolist()  # of each column, in the order of rounding
    columns = weight.T[places].contiguous()
    scales = _Scales(weight, scheme, count, clip_factor)
    if count == 1 or options.group_scales == "static":
        scales.find(range(count), weight)
    codes = torch.empty_like(columns, dtype=torch.int8 if scheme.symmetric else torch.uint8)
    for start in range(0, size, options.block_size):
        stop = min(start + options.block_size, size)
        if new := [group for group in dict.fromkeys(groups[start:stop]) if group not in scales.known]:
            now = torch.empty_like(columns)
            now[places] = columns
            scales.find(new, now.T)
        block, own = columns[start:stop], inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i, diagonal in enumerate(own.diagonal().tolist()):
            column = block[i][:, None]
            scale, zero = scales.of(groups[start + i])
            code = encode(column, scale, zero, scheme.bits)
            codes[start + i] = code[:, 0]
            errors[i] = (column - decode(code, scale, zero, column.dtype))[:, 0] / diagonal
            block[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[places] = codes
    return in_place.T.contiguous(), scales.scale.to(WEIGHT_SCALE), scales.zero


class _Scales:
    """Scales and zero points [rows, groups], some of them known; scales in the weight's dtype, rounded."""

    def __init__(self, weight: Tensor, scheme: QuantScheme, count: int, clip_factor: float | Tensor) -> None:
        self.known: set[int] = set()
        self.scale = weight.new_empty(len(weight), count)
        self.zero = None if scheme.symmetric else weight.new_empty(len(weight), count, dtype=torch.uint8)
        self._scheme, self._clip_factor = scheme, clip_factor

    def find(self, groups: list[int] | range, weight: Tensor) -> None:
        """Find those of some groups, from a matrix."""
        scheme, chosen = self._scheme, list(groups)
        part = split_groups(weight, self.scale.shape[1])[:, chosen].flatten(1)
        group = part.shape[1] // len(chosen)
        clip: float | Tensor | str = scheme.clip
        if isinstance(clip, str):
            clip = (search_clip(part, scheme.bits, group, scheme.symmetric) * self._clip_factor).clamp(max=1)
        scale, zero = weight_scale_and_zero(part, scheme.bits, group, clip, scheme.symmetric)
        self.scale[:, chosen] = scale.to(self.scale.dtype)
        if self.zero is not None and zero is not None:
            self.zero[:, chosen] = zero
        self.known.update(chosen)

    def of(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Return those of one group, [rows, 1]."""
        return self.scale[:, group : group + 1], None if self.zero is None else self.zero[:, group : group + 1]
