"""Traps that compute: what is linear only along some axes, or not at all."""

from typing import Literal

import torch
from torch import Tensor

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Trap

Axis = Literal[-1, -2, 0]
Shape = Literal["channels", "tokens", "matrix", "whole", "one", "more axes"]

library = torch.library.Library("decoder_grammar", "DEF")
library.define("unknown(Tensor x) -> Tensor")
library.impl("unknown", lambda x: 2 * x + x.roll(1, -1).square(), "CompositeExplicitAutograd")


@torch.library.register_fake("decoder_grammar::unknown")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _term(m: Scope, x: Tensor, shape: Shape, kind: Literal["weight", "input", "integers"]) -> Tensor:
    """A tensor that broadcasts with x."""
    sizes = {
        "channels": x.shape[-1:],
        "tokens": (x.shape[-2], 1),
        "matrix": x.shape[-2:],
        "whole": x.shape,
        "one": (1,),
        "more axes": (1,) * x.ndim + x.shape[-1:],
    }[shape]
    return {"weight": m.weight, "input": m.input, "integers": m.integers}[kind](*sizes)


@production(Trap)
def term_added(
    m: Scope,
    x: Tensor,
    *,
    shape: Shape,
    kind: Literal["weight", "input", "integers"],
    by: Literal["+", "-", "alpha", "rsub", "iadd"],
) -> Tensor:
    term = _term(m, x, shape, kind)
    if by == "alpha":
        y = torch.add(x, term, alpha=2)
    elif by == "iadd" and term.ndim <= x.ndim:
        y = x.clone()
        y += term
    else:
        y = term - x if by == "rsub" else x - term if by == "-" else x + term
    return y.reshape(x.shape).to(x.dtype)


@production(Trap)
def factor(
    m: Scope,
    x: Tensor,
    *,
    shape: Shape,
    kind: Literal["weight", "input", "integers"],
    by: Literal["*", "/", "under", "addcmul", "lerp", "where"],
) -> Tensor:
    term = _term(m, x, shape, kind)
    if by == "/":
        y = x / (term.abs() + 1)
    elif by == "under":
        y = term / (x.abs() + 1)
    elif by == "addcmul" and kind != "integers":
        y = torch.addcmul(x, term, x)
    elif by == "lerp" and kind != "integers":
        y = torch.lerp(x, -x, term)
    else:
        y = torch.where(term > 0.2, x, -x) if by == "where" else x * term
    return y.broadcast_to((1,) * (y.ndim - x.ndim) + x.shape).reshape(x.shape).to(x.dtype)


@production(Trap)
def number(m: Scope, x: Tensor, *, by: Literal["+", "-", "rsub", "*", "/", "under", "**", "neg"]) -> Tensor:
    match by:
        case "+":
            return x + 0.5
        case "-":
            return x - 0.5
        case "rsub":
            return 1 - x
        case "*":
            return x * 3
        case "/":
            return x / 3
        case "under":
            return 1 / (x.square() + 1)
        case "**":
            return x**3
    return -x


@production(Trap)
def non_linear(
    m: Scope,
    x: Tensor,
    *,
    by: Literal["abs", "relu", "x * x", "clamp", "exp", "mask", "dropout", "maximum", "atan", "unknown"],
) -> Tensor:
    match by:
        case "x * x":
            return x * x
        case "clamp":
            return x.clamp(min=-0.3)
        case "exp":
            return (-x.abs()).exp()
        case "mask":
            return x.masked_fill(x > 0.3, 0.0)
        case "dropout":
            return torch.nn.functional.dropout(x, 0.5, training=False)
        case "maximum":
            return torch.maximum(x, -0.5 * x)
        case "unknown":
            return torch.ops.decoder_grammar.unknown(x)
    return getattr(torch, by)(x)


@production(Trap)
def along_an_axis(
    m: Scope, x: Tensor, *, axis: Axis, by: Literal["softmax", "cumsum", "log_softmax", "cumprod", "normalize"]
) -> Tensor:
    if by == "normalize":
        return torch.nn.functional.normalize(x, dim=axis, eps=1e-3)
    return getattr(x, by)(axis)


@production(Trap)
def reduced(
    m: Scope,
    x: Tensor,
    *,
    axis: Literal[-1, -2, 0, "all", "last two"],
    by: Literal["mean", "sum", "amax", "std", "norm", "mean of squares", "logsumexp"],
    into: Literal["-", "*", "+"],
    keepdim: bool,
) -> Tensor:
    """Put into relation to what it is along an axis."""
    axes = list(range(x.ndim)) if axis == "all" else [-2, -1] if axis == "last two" else [axis]
    y = {
        "mean": lambda: x.mean(axes, keepdim=keepdim),
        "sum": lambda: x.sum(axes, keepdim=keepdim),
        "amax": lambda: x.amax(axes, keepdim=keepdim),
        "std": lambda: (x.var(axes, keepdim=keepdim, unbiased=False) + 1).sqrt(),
        "norm": lambda: torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim),
        "mean of squares": lambda: x.square().mean(axes, keepdim=keepdim),
        "logsumexp": lambda: x.logsumexp(axes, keepdim=keepdim),
    }[by]()
    if not keepdim:
        y = y.reshape([1 if dim - x.ndim in axes or dim in axes else size for dim, size in enumerate(x.shape)])
    return x - y if into == "-" else x + y if into == "+" else x * y


@production(Trap)
def centred_otherwise(m: Scope, x: Tensor, *, by: Literal["wide", "alpha", "without keepdim", "twice"]) -> Tensor:
    """Almost LayerNorm's centring."""
    if by == "wide":
        return (x - x.mean(-1, keepdim=True, dtype=torch.float64)).to(x.dtype)
    if by == "alpha":
        return torch.sub(x, x.mean(-1, keepdim=True), alpha=2)
    if by == "twice":
        mean = x.mean(-1, keepdim=True)
        return x - mean - mean
    return x - x.mean(-1)[..., None]
