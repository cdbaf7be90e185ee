"""Views: the same elements under other axes, so a basis is split, merged, moved or kept with its factors."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from quarot_fx.basis.operator import Axis, Operator, Tensor
from quarot_fx.basis.rules import rule

aten = torch.ops.aten


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
    aten.reshape_as.default,
)  # fmt: skip
def regroup(op: Operator) -> None:
    """``(heads * head_dim) -> (heads, head_dim)``: factors stay, axes are cut elsewhere."""
    source = op.uses[0]
    if 0 in source.shape or 0 in op.result.shape:
        return op.barrier("an empty tensor can be viewed as anything")
    for left, right in _groups(source, op.result):
        op.tie(left, right)
    return None  # of view_as's second operand only the shape is read


def _groups(source: Tensor, result: Tensor) -> Iterator[tuple[list[Axis], list[Axis]]]:
    """Yield the smallest runs of axes of equal size on both sides, symbolic sizes compared as expressions."""
    left, right = source.axes()[::-1], result.axes()[::-1]
    while left or right:
        a, b = ([left.pop()] if left else []), ([right.pop()] if right else [])
        while (left or right) and (sizes := (prod(x.size for x in a), prod(x.size for x in b)))[0] != sizes[1]:
            if left and (not right or _is_smaller(*sizes)):
                a.append(left.pop())
            else:
                b.append(right.pop())
        yield a, b


def _is_smaller(size: object, other: object) -> bool:
    """Whether a run must grow to reach ``other``: a divisor of it, be it a number or an expression."""
    quotient = other / size  # type: ignore[operator]
    return quotient > 1 if isinstance(quotient, int | float) else bool(quotient.as_numer_denom()[1] == 1)


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default, aten.movedim.int,
      aten.swapaxes.default, aten.mT.default)  # fmt: skip
def permutation(op: Operator) -> None:
    """Axes move, each with its basis."""
    source = op.uses[0]
    order = list(range(source.ndim))
    if op.node.target is aten.permute.default:
        order = [dim % source.ndim for dim in op["dims"]]
    elif op.node.target is aten.movedim.int:
        moved = order.pop(op["source"] % source.ndim)
        order.insert(op["destination"] % source.ndim, moved)
    elif op.node.target is aten.mT.default:
        order[-2:] = order[:-3:-1]
    elif op.node.target in (aten.t.default, aten.numpy_T.default):
        order.reverse()
    else:
        first, second = (op["dim0"], op["dim1"]) if op["dim0"] is not None else (op["axis0"], op["axis1"])
        order[first], order[second] = order[second], order[first]
    for dim, origin in enumerate(order):
        op.tie(source.axis(origin), op.result.axis(dim))


@rule(aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.repeat_interleave.self_int,
      aten.broadcast_to.default)  # fmt: skip
def repetition(op: Operator) -> None:
    """Repeats whole axes; the repeated axis itself is canonical."""
    source = op.uses[0]
    missing = op.result.ndim - source.ndim
    if missing < 0:
        return op.barrier("flattens and repeats")
    for axis in op.result.axes():
        origin = source.axis(axis.dim - missing) if axis.dim >= missing else None
        if origin is not None and origin.size == axis.size:
            op.tie(origin, axis)
        else:
            op.pin([axis] if origin is None else [axis, origin], "repeats along this axis")
    return None
