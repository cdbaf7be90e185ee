"""Taking and putting elements: the axis that is indexed is canonical, all others keep their basis."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quarot_fx.basis.operator import Axis, Operator, Tensor
from quarot_fx.basis.rules import rule

aten = torch.ops.aten
WHY = "takes a part of this axis"


def along(op: Operator, dim: int, tensors: Iterable[Tensor]) -> None:
    """Tie all axes but ``dim`` of tensors of one rank to the first one's."""
    first, *others = tensors
    for axis in first.axes():
        if axis.dim == dim % first.ndim:
            op.pin([axis, *(other.axis(dim) for other in others)], WHY)
        else:
            for other in others:
                op.tie(axis, other.axis(axis.dim))


@rule(aten.slice.Tensor, aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
      aten.flip.default, aten.roll.default, aten.pad.default, aten.constant_pad_nd.default)  # fmt: skip
def part(op: Operator) -> None:
    """Slices and splits; an axis whose size does not change in a slice is not touched."""
    source = op.uses[0]
    for result in op.results:
        for axis, origin in zip(result.axes(), source.axes(), strict=True):
            moves = op.node.target in (aten.flip.default, aten.roll.default) or _shifts_or_fills(op)
            if axis.size == origin.size and not moves:
                op.tie(origin, axis)
            else:
                op.pin([axis, origin], WHY)


def _shifts_or_fills(op: Operator) -> bool:
    """Whether a pad puts anything but zeros, or takes away at one end, so that an equal size is not the same axis."""
    return bool(op["value"]) or any(not isinstance(width, int) or width < 0 for width in op["pad"] or ())


@rule(aten.select.int, aten.unbind.int)
def one(op: Operator) -> None:
    """One entry of an axis, or each of them."""
    source, dim = op.uses[0], (op["dim"] or 0) % op.uses[0].ndim
    op.pin(source.axis(dim), WHY)
    kept = [axis for axis in source.axes() if axis.dim != dim]
    for result in op.results:
        for axis, origin in zip(result.axes(), kept, strict=True):
            op.tie(origin, axis)


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default, aten.slice_scatter.default)
def concatenation(op: Operator) -> None:
    """Tensors side by side along one axis."""
    tensors = [use for use in op.uses if use.ndim == op.result.ndim]  # cat accepts legacy empty 1-d tensors
    op.barrier("is empty", [use for use in op.uses if use.ndim != op.result.ndim])
    along(op, op["dim"] if op["dim"] is not None else op["axis"], [op.result, *tensors])


@rule(aten.hstack.default)
def hstack(op: Operator) -> None:
    """Tensors side by side along the second axis, or the only one."""
    along(op, min(1, op.result.ndim - 1), [op.result, *op.uses])


@rule(aten.stack.default)
def stack(op: Operator) -> None:
    """Tensors side by side along a new axis."""
    dim = op["dim"] % op.result.ndim
    op.pin(op.result.axis(dim), WHY)
    kept = [axis for axis in op.result.axes() if axis.dim != dim]
    for use in op.uses:
        for axis, result in zip(use.axes(), kept, strict=True):
            op.tie(axis, result)


@rule(aten.topk.default, aten.sort.default, aten.max.dim, aten.min.dim, aten.gather.default, aten.scatter.value,
      aten.scatter.src, aten.histc.default, aten.argsort.default)  # fmt: skip
def choice(op: Operator) -> None:
    """Entries chosen one by one, by rank or by an index of the tensor's own shape."""
    op.barrier("chooses elements one by one")


@rule(aten.select_scatter.default)
def select_scatter(op: Operator) -> None:
    """One entry of an axis replaced."""
    target, source, dim = op.uses[0], op.uses[1], op["dim"] % op.uses[0].ndim
    along(op, dim, [op.result, target])
    kept = [axis for axis in op.result.axes() if axis.dim != dim]
    for axis, result in zip(source.axes(), kept, strict=True):
        op.tie(axis, result)


@rule(aten.embedding.default)
def embedding(op: Operator) -> None:
    """Rows of a table: a free source, the table absorbs any basis of its rows."""
    op.tie(op["weight"].axis(1), op.result.axis(-1))
    op.pin([op["weight"].axis(0), *op.result.axes()[:-1], *op["indices"].axes()], WHY)


@rule(aten.index_select.default, aten.index_copy.default, aten.index_add.default)
def index_along(op: Operator) -> None:
    """Entries of one axis read, written or added to at given positions."""
    op.pin(op["index"].axes(), "is an index")
    along(op, op["dim"], [op.result, *(use for use in op.uses if use is not op["index"])])


@rule(aten.index.Tensor, aten.index_put.default)
def index(op: Operator) -> None:
    """``x[:, rows]`` and ``x[:, rows] = values``: axes that are not indexed keep their basis."""
    source, indices = op.uses[0], op["indices"]
    tensors = [index for index in indices if index is not None]
    places = [dim for dim, index in enumerate(indices) if index is not None]
    for index in tensors:
        op.pin(index.axes(), "is an index")
    consecutive = places == list(range(places[0], places[-1] + 1))
    is_mask = any(index.node.meta["val"].dtype in (torch.bool, torch.uint8) for index in tensors)
    if not consecutive or is_mask:
        return op.barrier("has indices apart, or a mask")
    picked = max(index.ndim for index in tensors)
    kept = [axis for axis in source.axes() if axis.dim not in places]
    first = places[0]

    def tie_kept(tensor: Tensor) -> None:
        axes: list[Axis] = tensor.axes()
        op.pin(axes[first : first + picked], WHY)
        for axis, origin in zip(axes[:first] + axes[first + picked :], kept, strict=True):
            op.tie(origin, axis)

    op.pin([source.axis(dim) for dim in places], WHY)
    if op.node.target is aten.index.Tensor:
        return tie_kept(op.result)
    for axis, origin in zip(op.result.axes(), source.axes(), strict=True):
        op.tie(origin, axis)
    values = op["values"]
    if values.ndim == picked + len(kept):
        tie_kept(values)
    else:
        op.pin([*values.axes(), *op.result.axes()], "is broadcast")
    return None
