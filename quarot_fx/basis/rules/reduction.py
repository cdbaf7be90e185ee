"""Reductions: along the reduced axis canonical, unless the result is a length, which no rotation changes."""

from __future__ import annotations

import torch

from quarot_fx.basis.operator import Operator
from quarot_fx.basis.rules import rule

aten = torch.ops.aten


def _kept(op: Operator, dims: set[int]) -> None:
    source = op.uses[0]
    kept = [axis for axis in source.axes() if axis.dim not in dims]
    results = op.result.axes()
    if len(results) == source.ndim:
        results = [axis for axis in results if axis.dim not in dims]
    for axis, result in zip(kept, results, strict=True):
        op.tie(axis, result)


@rule(aten.sum.dim_IntList, aten.mean.dim)
def total(op: Operator) -> None:
    """Sums and means are linear in every axis that they keep."""
    source = op.uses[0]
    dims = {dim % source.ndim for dim in (op["dim"] or range(source.ndim))}
    op.pin([source.axis(dim) for dim in dims], "sums along this axis")
    _kept(op, dims)


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(op: Operator) -> None:
    """The length of a vector is the same in every basis; any other norm is not."""
    order = op["ord"] if op.node.target is aten.linalg_vector_norm.default else op["p"]
    dims = op["dim"]
    if order != 2 or dims is None or len(dims) != 1:
        return op.barrier("is not the length of vectors along one axis")
    for axis in op.uses[0].axes():
        if axis.dim != dims[0] % op.uses[0].ndim:
            op.pin(axis, "takes lengths for each entry of this axis")
    return op.pin(op.result.axes(), "is a length")
