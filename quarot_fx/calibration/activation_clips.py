"""Clip ratios of activations: one for the input of each layer, by what quantisation changes in the layer's output."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quarot_fx.calibration.inputs import LayerInputs
from quarot_fx.calibration.products import Product
from quarot_fx.calibration.report import CalibratedInput
from quarot_fx.config import QuantScheme
from quarot_fx.passes.quantized import quantization_behind, rounded, set_clip

# Every ratio costs a product with all rows of the data: few are tried, and then some around the best.
COARSE_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
FINER_STEPS = (0.05, 0.025)  # to the ratios that are tried next, from the best one so far


def search_input_clips(
    group: Sequence[Product], weights: Sequence[Tensor], inputs: LayerInputs
) -> list[CalibratedInput]:
    """Find the ratio with the least ``sum |W (x - Q(x))|^2`` over calibration data, for layers that share an input.

    Layers whose inputs are quantised in one way get one ratio: they read the same codes.

    Args:
        group: of layers.
        weights: [matrices, rows, n] of each.
        inputs: which have reached what the group's input is quantised from.
    """
    by_scheme: dict[QuantScheme, list[int]] = defaultdict(list)
    for index, product in enumerate(group):
        if product.activation is not None:
            by_scheme[product.activation].append(index)
    found = []
    for scheme, members in by_scheme.items():
        matrices = [torch.cat([weights[index][matrix] for index in members]) for matrix in range(len(weights[0]))]
        clip = search_input_clip(matrices, lambda matrix: inputs.sources(group, matrix), scheme)
        parameters = tuple(dict.fromkeys(group[index].linear.parameter for index in members))
        found.append(CalibratedInput(parameters, *clip))
    return found


def use_input_clips(group: Sequence[Product], found: Iterable[CalibratedInput]) -> None:
    """Let a group's inputs be clipped as was found, where the graph quantises them."""
    ratios = {parameter: one.clip for one in found for parameter in one.parameters}
    for product in group:
        if product.activation is not None and (quantization := quantization_behind(product.x)) is not None:
            set_clip(quantization, ratios[product.linear.parameter])


def search_input_clip(
    matrices: Sequence[Tensor], rows: Callable[[int], Iterable[Tensor]], scheme: QuantScheme
) -> tuple[float, float, float]:
    """Return a ratio, the relative change of the outputs that it makes by norm, and that without clipping.

    Args:
        matrices: [rows, n] of each.
        rows: of the number of a matrix: the rows [m, n] that meet it, in parts.
        scheme: bits, group and symmetry.
    """
    outputs = [_squared_outputs(matrix) for matrix in matrices]

    def errors(ratios: Sequence[float]) -> dict[float, float]:
        totals = torch.zeros(len(ratios), dtype=torch.float64, device=matrices[0].device)
        for matrix, squares in enumerate(outputs):
            for x in map(Tensor.float, rows(matrix)):
                totals += torch.stack([squares(x - rounded(x, replace(scheme, clip=ratio))) for ratio in ratios])
        return dict(zip(ratios, totals.tolist(), strict=True))

    known = errors(COARSE_RATIOS)
    for step in FINER_STEPS:
        best = _best(known)
        known |= errors([round(ratio, 3) for ratio in (best + step, best - step) if ratio <= 1])
    best = _best(known)
    whole = sum(float(squares(x.float())) for matrix, squares in enumerate(outputs) for x in rows(matrix))
    change, unclipped = (math.sqrt(max(known[ratio], 0) / whole) if whole else 0.0 for ratio in (best, 1.0))
    return best, change, unclipped


def _best(errors: dict[float, float]) -> float:
    """Return the ratio with the least error, the largest of equally good ones."""
    return min(errors, key=lambda ratio: (errors[ratio], -ratio))


def _squared_outputs(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function of rows [m, n] that is the sum of the squares of ``W x``, at the least cost."""
    rows, size = weight.shape
    if rows <= size:
        return lambda x: (x @ weight.T).square().sum().double()
    gram = weight.T @ weight
    return lambda x: ((x @ gram) * x).sum().double()
