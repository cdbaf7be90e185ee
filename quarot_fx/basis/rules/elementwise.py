"""Element by element: sums keep a common basis, scalings keep any, everything else needs the canonical one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quarot_fx.basis.operator import Axis, Operator, Tensor
from quarot_fx.basis.rules import rule

aten = torch.ops.aten


def broadcast(tensor: Tensor, result: Tensor) -> Iterator[tuple[Axis | None, Axis]]:
    """Yield, for every axis of the result, the operand's axis, or None where the operand is broadcast along it."""
    missing = result.ndim - tensor.ndim
    for axis in result.axes():
        if axis.dim < missing or (tensor.shape[axis.dim - missing] == 1 and axis.size != 1):
            yield None, axis
        else:
            yield tensor.axis(axis.dim - missing), axis


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
def addition(op: Operator) -> None:
    """``Q x + Q y = Q (x + y)``: all terms share one basis; a number, or a term repeated along an axis, fixes it."""
    if len(op.uses) < 2:
        return op.barrier("adds a number to every element")
    for use in op.uses:
        for axis, result in broadcast(use, op.result):
            if axis is None:
                op.pin(result, "adds the same value all along this axis")
            else:
                op.tie(axis, result)
    return None


@rule(
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.multiply.Tensor,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.true_divide.Tensor,
)
def scaling(op: Operator) -> None:
    """``Q (c x) = c Q x`` for a number, or a factor repeated along the axis; ``x * y`` needs the canonical basis."""
    operands = [list(broadcast(use, op.result)) for use in op.uses]
    is_division = op.node.target in (aten.div.Tensor, aten.true_divide.Tensor)
    for dim, result in enumerate(op.result.axes()):
        present = [axis for operand in operands if (axis := operand[dim][0]) is not None]
        if len(present) == 1 and not (is_division and len(op.uses) == 2 and operands[1][dim][0] is not None):
            op.tie(present[0], result)
        elif present:
            op.pin([*present, result], "multiplies element by element along this axis")


@rule(
    aten.neg.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
    aten.type_as.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten.positive.default,
)  # fmt: skip
def linear_unary(op: Operator) -> None:
    """Negation, copies, and casts between floating-point types commute with any rotation."""
    source = op.uses[0]
    if not source.node.meta["val"].dtype.is_floating_point:
        return op.barrier("casts integers")
    for axis, result in zip(source.axes(), op.result.axes(), strict=True):
        op.tie(axis, result)
    return None  # of type_as's second operand only the type is read


@rule(
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    aten.softplus.default, aten.log_sigmoid.default, aten.exp.default, aten.expm1.default, aten.log.default,
    aten.log1p.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.abs.default,
    aten.square.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.cos.default,
    aten.sin.default, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default,
    aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other, aten.floor.default,
    aten.leaky_relu.default, aten.elu.default, aten.hardtanh.default, aten.mish.default, aten.relu6.default,
    aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor, aten.round.default,
    aten.sign.default, aten.erf.default, aten.hardsigmoid.default, aten.hardswish.default, aten.polar.default,
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default,
    aten.log_softmax.int, aten.triu.default, aten.tril.default, aten.floor_divide.default, aten.div.Tensor_mode,
    aten.cumsum.default, aten.dropout.default,
    aten.view_as_complex.default, aten.view_as_real.default, aten.threshold.default, aten.celu.default,
    aten.selu.default, aten.atan2.default, aten.logsumexp.default,
)  # fmt: skip
def non_linear(op: Operator) -> None:
    """Anything that is not linear along an axis needs the canonical basis there, and few say where they are not."""
    op.barrier("is not linear")


@rule(
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
)
def selection(op: Operator) -> None:
    """Vectors that are chosen whole keep their basis; 0 is in every basis, any other number in the canonical one."""
    fills = op.node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    mask, choices = op["mask" if fills else "condition"], (op["self"], op["value" if fills else "other"])
    tensors = [choice for choice in choices if isinstance(choice, Tensor)]
    numbers = [choice for choice in choices if not isinstance(choice, Tensor)]
    masks = list(broadcast(mask, op.result))
    spans = [list(broadcast(tensor, op.result)) for tensor in tensors]
    for dim, result in enumerate(op.result.axes()):
        axes = [span[dim][0] for span in spans]
        if masks[dim][0] is not None or None in axes or any(number != 0 for number in numbers):
            op.pin([result, *(axis for axis in axes if axis is not None)], "chooses element by element along this axis")
        else:
            for axis in axes:
                op.tie(axis, result)  # type: ignore[arg-type]
