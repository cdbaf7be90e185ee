"""Traps that multiply matrices along axes other than the last, or with a weight that is something else besides."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Linear, Norm, Trap


@production(Trap)
def linear_over_tokens(m: Scope, x: Tensor, *, linear: Linear) -> Tensor:
    return linear(m, x.transpose(-1, -2), x.shape[-2]).transpose(-1, -2)


@production(Trap)
def linear_over_batch(m: Scope, x: Tensor, *, linear: Linear) -> Tensor:
    return linear(m, x.movedim(0, -1), x.shape[0]).movedim(-1, 0)


@production(Trap)
def linear_over_rows(m: Scope, x: Tensor, *, linear: Linear) -> Tensor:
    """Tokens and channels in one axis."""
    y = x.flatten(-2)
    return linear(m, y, y.shape[-1]).unflatten(-1, x.shape[-2:])


@production(Trap)
def linear_in_groups(m: Scope, x: Tensor, *, linear: Linear) -> Tensor:
    """The same layer for each half of the channels."""
    y = x.unflatten(-1, (2 if x.shape[-1] % 2 == 0 else 1, -1))
    return linear(m, y, y.shape[-1]).flatten(-2)


@production(Trap)
def one_more_linear(m: Scope, x: Tensor, *, linear: Linear, norm: Norm | None) -> Tensor:
    return linear(m, norm(m, x) if norm else x, x.shape[-1])


@production(Trap)
def weight_also_elementwise(
    m: Scope, x: Tensor, *, by: Literal["rows", "gain", "sum", "itself", "transpose", "output"]
) -> Tensor:
    """A matrix that is also added, multiplied with, applied twice, transposed, or returned."""
    w = m.weight(x.shape[-1], x.shape[-1])
    y = F.linear(x, w)
    match by:
        case "rows":
            return y + w[0]
        case "gain":
            return y * w[:, 0]
        case "sum":
            return y + w.sum()
        case "itself":
            return F.linear(y, w)
        case "transpose":
            return F.linear(y, w.t())
    m.outputs.append(w)
    return y


@production(Trap)
def weight_computed(
    m: Scope, x: Tensor, *, by: Literal["softmax", "product", "normed", "from x", "part", "flip"]
) -> Tensor:
    """A matrix that is the result of something."""
    w = m.weight(x.shape[-1], x.shape[-1])
    match by:
        case "softmax":
            w = w.softmax(-1)
        case "product":
            w = w @ w.t()
        case "normed":
            w = F.normalize(w, dim=0)
        case "from x":
            w = w * x.mean()
        case "part":
            w = m.weight(x.shape[-1] + 2, x.shape[-1] + 1)[1:-1, 1:]
        case "flip":
            w = w.flip(0)
    return F.linear(x, w)


@production(Trap)
def with_itself(m: Scope, x: Tensor, *, by: Literal["scores", "channels", "outer", "dot"]) -> Tensor:
    """Products of activations."""
    match by:
        case "scores":
            return (x @ x.transpose(-1, -2)) @ x
        case "channels":
            return x @ (x.transpose(-1, -2) @ x)
        case "outer":
            return (x[..., :, None] * x[..., None, :]).sum(-1)
    return x * (x * x).sum(-1, keepdim=True)


@production(Trap)
def vectors(m: Scope, x: Tensor, *, by: Literal["matrix by vector", "vector by matrix", "both sides"]) -> Tensor:
    if by == "matrix by vector":
        return x + (x @ m.weight(x.shape[-1]))[..., None]
    if by == "vector by matrix":
        return x + (m.weight(x.shape[-2]) @ x)[..., None, :]
    return m.weight(x.shape[-2], x.shape[-2]) @ x @ m.weight(x.shape[-1], x.shape[-1])


@production(Trap)
def looked_up(m: Scope, x: Tensor, *, table: Literal["own", "tied", "whole"]) -> Tensor:
    """Rows of a table added by an index, which may be a weight that is something else too."""
    size = x.shape[-1]
    w = m.tied(size, size) if table == "tied" else m.weight(size, size)
    ids = m.ids(size, x.shape[-2])
    return x + (w[ids] if table == "whole" else F.embedding(ids, w))


@production(Trap)
def convolved(m: Scope, x: Tensor, *, depthwise: bool) -> Tensor:
    """Over tokens."""
    size = x.shape[-1]
    rows = x.flatten(0, -3).transpose(1, 2)
    w = m.weight(size, 1 if depthwise else size, 3)
    y = torch.conv1d(rows, w, None, padding=1, groups=size if depthwise else 1)
    return y.transpose(1, 2).reshape(x.shape)
