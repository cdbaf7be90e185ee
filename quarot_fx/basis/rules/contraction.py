"""Products of matrices: the contracted axes cancel when both are in one basis, the free axes pass theirs on.

Nothing here asks whether an operand is a weight: a change of basis on a constant costs nothing, which is all that makes
``linear`` a free source and a free sink.
"""

from __future__ import annotations

import torch

from quarot_fx.basis.operator import Operator, Tensor
from quarot_fx.basis.rules import rule

aten = torch.ops.aten


def _product(op: Operator, left: Tensor, right: Tensor) -> None:
    """``left @ right`` with batch axes in front; those are canonical where both operands have them."""
    result = op.result
    if left.ndim == 0 or right.ndim == 0:
        return op.barrier("multiplies a scalar")
    op.tie(left.axis(-1), right.axis(-2) if right.ndim > 1 else right.axis(0))
    rest = result.axes()
    if right.ndim > 1:
        op.tie(right.axis(-1), rest.pop())
    if left.ndim > 1:
        op.tie(left.axis(-2), rest.pop())
    for offset, axis in enumerate(reversed(rest)):
        owners = [t.axis(t.ndim - 3 - offset) for t in (left, right) if t.ndim >= 3 + offset]
        if len(owners) == 1:
            op.tie(owners[0], axis)
        else:
            op.pin([*owners, axis], "runs over this axis as a batch")
    return None


@rule(aten.linear.default)
def linear(op: Operator) -> None:
    """``y = x W^T + b``."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    if weight.ndim == 1:
        return op.barrier("has a vector for a weight")
    op.tie(x.axis(-1), weight.axis(-1))
    *batch, out = op.result.axes()
    for axis, result in zip(x.axes(), batch, strict=False):
        op.tie(axis, result)
    op.tie(weight.axis(0), out)
    if bias is not None:
        op.tie(bias.axis(-1), out)
        op.pin(batch, "adds the same bias all along this axis")
    return None


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)
def matmul(op: Operator) -> None:
    """``y = x W``."""
    _product(op, op["self"], op["other"] or op["mat2"] or op["vec"])


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(op: Operator) -> None:
    """``y = b + x W``."""
    left, right = (op["mat1"], op["mat2"]) if op["mat1"] is not None else (op["batch1"], op["batch2"])
    _product(op, left, right)
    bias = op["self"]
    for axis in op.result.axes():
        dim = axis.dim - (op.result.ndim - bias.ndim)
        if dim >= 0 and bias.shape[dim] == axis.size:
            op.tie(bias.axis(dim), axis)
        else:
            op.pin(axis, "adds the same bias all along this axis")


@rule(aten.conv1d.default)
def convolution(op: Operator) -> None:
    """Slides along the last axis; channels mix with all others of their group, which is a product with a matrix for
    each place of the kernel.
    """
    x, weight, bias = op["input"], op["weight"], op["bias"]
    result = op.result
    op.pin([x.axis(-1), weight.axis(-1), result.axis(-1)], "slides along this axis")
    if x.ndim == 3:
        op.tie(x.axis(0), result.axis(0))
    if op["groups"] == 1:
        op.tie(x.axis(-2), weight.axis(1))
        op.tie(weight.axis(0), result.axis(-2))
    else:
        op.pin([x.axis(-2), weight.axis(0), weight.axis(1), result.axis(-2)], "keeps groups of this axis apart")
    if bias is not None:
        op.tie(bias.axis(0), result.axis(-2))
        op.pin(result.axes()[:-2], "adds the same bias all along this axis")


@rule(aten.linalg_solve_triangular.default)
def triangular_solve(op: Operator) -> None:
    """``A^-1 B``: every column of B is solved for by itself, so its columns may mix; with ``left=False`` its rows."""
    matrix, right = op["self"], op["B"]
    free = -1 if op["left"] is not False else -2
    op.pin(matrix.axes(), "is triangular")
    for axis, result in zip(right.axes(), op.result.axes(), strict=False):
        if axis.dim == free % right.ndim and right.ndim == op.result.ndim:
            op.tie(axis, result)
        else:
            op.pin([axis, result], "is solved for along this axis")


@rule("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
def grouped_mm(op: Operator) -> None:
    """``y = x[rows of group e] W[e]``: experts."""
    x, weight = op.uses[0], op.uses[1]
    if op["bias"] is not None or weight.ndim != 3:
        return op.barrier("adds a bias, or groups what it sums over")
    op.tie(x.axis(-1), weight.axis(-2))
    op.tie(weight.axis(-1), op.result.axis(-1))
    op.pin([*x.axes()[:-1], *weight.axes()[:-2], *op.result.axes()[:-1]], "picks the expert by row")
    for use in op.uses[2:]:
        op.pin(use.axes(), "picks the expert by row")
    return None


@rule(aten.scaled_dot_product_attention.default)
def attention(op: Operator) -> None:
    """``softmax(q k^T) v``: q and k cancel in any common basis of head_dim, v's basis passes to the result."""
    query, key, val = op["query"], op["key"], op["value"]
    op.tie(query.axis(-1), key.axis(-1))
    op.tie(val.axis(-1), op.result.axis(-1))
    for tensor in (query, key, val, op.result):
        op.pin(tensor.axes()[:-1], "attends over this axis, head by head")
    if op["attn_mask"] is not None:
        op.pin(op["attn_mask"].axes(), "is a mask")
