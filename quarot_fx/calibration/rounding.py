"""Rounds the weights of layers that share an input: one Hessian at a time, for all of them at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from quarot_fx.calibration.calibrated import PackedCodes
from quarot_fx.calibration.gptq import gptq_round
from quarot_fx.calibration.hessian import Hessian
from quarot_fx.calibration.inputs import LayerInputs
from quarot_fx.calibration.nearest import nearest_round
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.products import Product
from quarot_fx.calibration.report import CalibratedWeight
from quarot_fx.calibration.rounded import Rounded
from quarot_fx.config import QuantScheme


def round_weights(
    group: Sequence[Product], weights: Sequence[Tensor], inputs: LayerInputs, options: GPTQOptions
) -> tuple[list[PackedCodes], list[CalibratedWeight]]:
    """Return the codes of those weights of a group that calibration rounds, in order, and a record for every matrix.

    Args:
        group: of layers that share an input.
        weights: [matrices, rows, n] of each.
        inputs: which have reached the group's.
        options: of GPTQ.

    Raises:
        HessianError: a Hessian is not positive definite with the damping allowed.
    """
    alike: dict[tuple[str, QuantScheme], list[int]] = defaultdict(list)
    for index, product in enumerate(group):
        if product.quantization is not None:
            alike[product.rounding, product.scheme].append(index)
    if not alike:
        return [], []
    rounded: list[list[Rounded]] = [[] for _ in group]  # by weight and matrix
    records = []
    for matrix in range(len(weights[0])):
        size = weights[0].shape[-1]
        hessian = Hessian(size, weights[0].device, inputs.has_target(group))
        for rows, target in inputs.rows(group, matrix):
            hessian.add(rows, target)
        for (rounding, scheme), members in alike.items():
            matrices = [weights[index][matrix] for index in members]
            name = group[members[0]].linear.parameter
            if rounding == "gptq":
                result = gptq_round(torch.cat(matrices), hessian, scheme, options, name)
            else:
                result = nearest_round(torch.cat(matrices), hessian, scheme)
            for index, part in zip(members, result.split([len(one) for one in matrices]), strict=True):
                rounded[index].append(part)
                records.append(
                    CalibratedWeight(
                        parameter=group[index].linear.parameter,
                        matrix=matrix if group[index].stack else None,
                        inputs=size,
                        tokens=hessian.rows,
                        damping=part.damping,
                        error=part.error,
                        nearest_error=part.nearest_error,
                    )
                )
    return [_pack(product, parts) for product, parts in zip(group, rounded, strict=True) if parts], records


def _pack(product: Product, parts: Sequence[Rounded]) -> PackedCodes:
    def whole(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).unflatten(0, product.stack) if product.stack else tensors[0]

    packed = torch.ops.quarot.pack(whole([part.codes for part in parts]), product.scheme.bits)
    scale = whole([part.scale for part in parts])
    zeros = [part.zero for part in parts if part.zero is not None]
    zero = whole(zeros) if zeros else scale.new_empty(0, dtype=torch.uint8)
    return PackedCodes(packed.cpu(), scale.cpu(), zero.cpu())
