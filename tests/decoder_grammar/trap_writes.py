"""Traps that write in place: into parts, through views, into inputs, by operators that nobody knows."""

from typing import Literal

import torch
from torch import Tensor

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Linear, Trap
from decoder_grammar.trap_values import library

View = Literal["whole", "channels", "tokens", "one", "transposed", "flat", "step"]


def _write_unknown(x: Tensor) -> None:
    x.mul_(x + 1)


library.define("write(Tensor(a!) x) -> ()")
library.impl("write", _write_unknown, "CompositeExplicitAutograd")
library.define("write_second(Tensor x, Tensor(a!) y) -> Tensor")
library.impl("write_second", lambda x, y: x + y.add_(x), "CompositeExplicitAutograd")


write, write_second = torch.ops.decoder_grammar.write, torch.ops.decoder_grammar.write_second


@torch.library.register_fake("decoder_grammar::write")
def _(x: Tensor) -> None:
    return None


@torch.library.register_fake("decoder_grammar::write_second")
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def _view(x: Tensor, which: View) -> Tensor:
    match which:
        case "channels":
            return x[..., x.shape[-1] // 2 :]
        case "tokens":
            return x[..., x.shape[-2] // 2 :, :]
        case "one":
            return x[..., 0]
        case "transposed":
            return x.transpose(-1, -2)
        case "flat":
            return x.view(-1)
        case "step":
            return x[..., ::2]
    return x


Write = Literal["add", "mul", "zero", "copy", "fill", "unknown", "clamp", "index", "weight"]


def _write(m: Scope, view: Tensor, how: Write) -> None:
    match how:
        case "add":
            view.add_(1.5)
        case "mul":
            view.mul_(-2)
        case "zero":
            view.zero_()
        case "copy":
            view.copy_(m.weight(view.shape[-1]))
        case "fill":
            view[..., 0] = 0.5
        case "unknown":
            write(view)
        case "clamp":
            view.clamp_(-0.5, 0.5)
        case "index":
            view[..., torch.arange(1)] = m.weight(1)
        case "weight":
            view += m.weight(view.shape[-1])


@production(Trap)
def copy_written(m: Scope, x: Tensor, *, view: View, how: Write) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    _write(m, _view(y, view), how)
    return y


@production(Trap)
def written_in_place(m: Scope, x: Tensor, *, view: View, how: Write) -> Tensor:
    """Whoever else reads x sees it."""
    x = x.contiguous()
    _write(m, _view(x, view), how)
    return x


@production(Trap)
def read_before_and_after(m: Scope, x: Tensor, *, view: View, how: Write, linear: Linear) -> Tensor:
    """A view is taken, written through another one, and read."""
    y = linear(m, x, x.shape[-1]).contiguous()
    before, alias = y * 2, y.transpose(0, -1)
    _write(m, _view(y, view), how)
    return before + alias.transpose(0, -1)


@production(Trap)
def input_written(m: Scope, x: Tensor, *, view: View, how: Write, first: bool) -> Tensor:
    given = m.input(*x.shape)
    if first:
        _write(m, _view(given, view), how)
        return x + given
    y = x + given
    given.copy_(y)
    return y


@production(Trap)
def weight_written(m: Scope, x: Tensor, *, how: Literal["copy", "add", "unknown", "second"]) -> Tensor:
    """A parameter that the program itself changes."""
    w = m.weight(x.shape[-1], x.shape[-1])
    y = x @ w
    match how:
        case "copy":
            w.copy_(w.t().contiguous())
        case "add":
            w[0] += 1
        case "unknown":
            write(w)
        case "second":
            y = write_second(y, m.weight(*y.shape))
    return y @ w


@production(Trap)
def part_written_by_unknown(m: Scope, x: Tensor, *, linear: Linear, overlap: bool) -> Tensor:
    """A packed result, one part of which an operator writes that nobody knows."""
    size = x.shape[-1]
    y = linear(m, x, 2 * size)
    first, second = y[..., :size], y[..., size - int(overlap) : 2 * size - int(overlap)]
    write(first)
    return first + second


@production(Trap)
def scattered(m: Scope, x: Tensor, *, by: Literal["index_add", "scatter", "select_scatter", "slice_scatter"]) -> Tensor:
    rows = torch.arange(x.shape[-2]).roll(1)
    match by:
        case "index_add":
            return x.index_add(-2, rows, 2 * x)
        case "scatter":
            return x.scatter(-1, rows[:, None].expand(x.shape) * 0, x[..., :1].expand(x.shape))
        case "select_scatter":
            return torch.select_scatter(x, -x.select(-2, 0), -2, x.shape[-2] - 1)
    return torch.slice_scatter(x, -x[..., :1, :], -2, 0, 1)
