"""Traps that move elements: the same numbers elsewhere, so that an axis is mistaken for another, or for itself."""

from typing import Literal

import torch
from torch import Tensor

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Trap

Axis = Literal[-1, -2, 0]


@production(Trap)
def transposed(m: Scope, x: Tensor, *, contiguous: bool) -> Tensor:
    """There and back: nothing happens."""
    y = x.transpose(0, -1)
    return (y.contiguous() if contiguous else y).transpose(0, -1)


@production(Trap)
def scrambled(m: Scope, x: Tensor, *, by: Literal["reshape", "transpose", "movedim", "T of rows"]) -> Tensor:
    """Elements change rows."""
    if by == "reshape":
        return x.transpose(-1, -2).reshape(x.shape)
    if by == "transpose" and x.shape[-1] == x.shape[-2]:
        return x.transpose(-1, -2)
    if by == "movedim":
        return x.movedim(0, -1).reshape(x.shape)
    return x.reshape(x.shape[-1], -1).t().reshape(x.shape)


def _outer(size: int) -> int:
    """The smallest proper factor of a size; 1 if it is prime."""
    return next((factor for factor in range(2, size) if size % factor == 0), 1)


@production(Trap)
def channels_permuted(m: Scope, x: Tensor, *, inverse: bool) -> Tensor:
    """The factors of the last axis change places."""
    outer = _outer(x.shape[-1])
    y = x.unflatten(-1, (-1, outer) if inverse else (outer, -1))
    return y.transpose(-1, -2).flatten(-2)


@production(Trap)
def regrouped(m: Scope, x: Tensor, *, square: bool) -> Tensor:
    """Rows of another size, along which something is done."""
    rows = x.reshape(-1, _outer(x.numel()))
    return (rows * rows if square else rows @ m.weight(rows.shape[-1], rows.shape[-1])).reshape(x.shape)


@production(Trap)
def taken(m: Scope, x: Tensor, *, axis: Axis, by: Literal["slice", "narrow", "select", "split", "step"]) -> Tensor:
    """One part negated."""
    size = x.shape[axis]
    middle = size // 2
    if by == "select":
        return torch.cat((x.narrow(axis, 0, size - 1), -x.select(axis, size - 1).unsqueeze(axis)), axis)
    if by == "step":
        y = x.movedim(axis, 0)
        parts = [y[::2], -y[1::2]]
        return torch.cat(parts, 0).movedim(0, axis)
    if by == "split":
        first, *others = x.split(max(middle, 1), axis)
        return torch.cat((-first, *others), axis)
    first, second = x.narrow(axis, 0, middle), x.narrow(axis, middle, size - middle)
    return torch.cat((first, -second) if by == "narrow" else (second, first), axis)


@production(Trap)
def moved(m: Scope, x: Tensor, *, axis: Axis, by: Literal["flip", "roll", "pad", "sort", "tril"]) -> Tensor:
    if by == "pad":
        y = x.movedim(axis, -1)
        return torch.nn.functional.pad(y, (1, -1)).movedim(-1, axis)
    if by == "sort":
        return x.sort(axis).values
    if by == "tril":
        return x.tril()
    return x.flip(axis) if by == "flip" else x.roll(1, axis)


@production(Trap)
def indexed(m: Scope, x: Tensor, *, axis: Axis, by: Literal["index", "index_select", "gather", "take_along"]) -> Tensor:
    order = torch.arange(x.shape[axis]).roll(1)
    if by == "index_select":
        return x.index_select(axis, order)
    if by == "index":
        return x[..., order] if axis == -1 else x[..., order, :] if axis == -2 else x[order]
    shape = [1] * x.ndim
    shape[axis] = -1
    order = order.reshape(shape).expand(x.shape)
    return x.gather(axis, order) if by == "gather" else torch.take_along_dim(x, order, axis)


@production(Trap)
def doubled(m: Scope, x: Tensor, *, axis: Axis, by: Literal["cat", "stack", "repeat", "expand"], half: bool) -> Tensor:
    """Beside itself, of which a half or the sum is taken."""
    if by in ("stack", "expand"):
        y = torch.stack((x, -2 * x), axis) if by == "stack" else x.unsqueeze(0).expand(3, *x.shape)
        axis = axis if by == "stack" else 0
        return y.select(axis, 1) if half else y.sum(axis)
    size = x.shape[axis]
    repeats = [1] * x.ndim
    repeats[axis] = 2
    y = torch.cat((x, 2 * x), axis) if by == "cat" else x.repeat(repeats)
    return y.narrow(axis, size // 2, size) if half else y.narrow(axis, 0, size) + y.narrow(axis, size, size)


@production(Trap)
def added_to_its_transpose(m: Scope, x: Tensor) -> Tensor:
    """Two axes of one size must then share a basis."""
    if x.shape[-1] == x.shape[-2]:
        return x + x.transpose(-1, -2)
    if x.shape[0] == x.shape[-1]:
        return x + x.transpose(0, -1)
    outer = _outer(x.shape[-1])
    y = x.unflatten(-1, (outer, -1))
    return (y + y.transpose(-1, -2)).flatten(-2) if outer**2 == x.shape[-1] else x


@production(Trap)
def diagonal(m: Scope, x: Tensor) -> Tensor:
    return x + x.diagonal(0, -2, -1).sum(-1)[..., None, None]


@production(Trap)
def bits_cast(m: Scope, x: Tensor, *, to: Literal["complex", "half", "double", "type_as", "like"]) -> Tensor:
    if to == "complex" and x.shape[-1] % 2 == 0 and x.dtype != torch.bfloat16:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).clone(memory_format=torch.contiguous_format))
        return torch.view_as_real(pairs * 1j).flatten(-2)
    if to == "type_as":
        return x.double().type_as(x)
    if to == "like":
        return torch.zeros_like(x) + x
    return x.to(torch.float16 if to == "half" else torch.float64).to(x.dtype)
