"""Feed-forward blocks: gated or not, packed, and of experts."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Activation, Linear, Mixer, Norm, Packed, Trap


@production(Mixer, weight=2)
def gated_mlp(
    m: Scope, x: Tensor, *, packed: Packed, act: Activation, down: Linear, norm: Norm | None, trap: Trap | None
) -> Tensor:
    gate, up = packed(m, x, [m.sizes.inner] * 2)
    y = act(m, gate) * up
    for step in (norm, trap):
        y = step(m, y) if step else y
    return down(m, y, x.shape[-1])


@production(Mixer, weight=2)
def mlp(m: Scope, x: Tensor, *, up: Linear, act: Activation, down: Linear, trap: Trap | None) -> Tensor:
    y = up(m, x, m.sizes.inner)
    for step in (act, trap):
        y = step(m, y) if step else y
    return down(m, y, x.shape[-1])


@production(Mixer)
def one_linear(m: Scope, x: Tensor, *, linear: Linear) -> Tensor:
    return linear(m, x, x.shape[-1])


@production(Mixer)
def experts(
    m: Scope, x: Tensor, *, by: Literal["bmm", "einsum", "matmul", "gather"], act: Activation, top_1: bool
) -> Tensor:
    """All experts for every token, or the weights of one gathered for each, weighted by a router."""
    count, hidden, inner = 3, x.shape[-1], m.sizes.inner
    scores = F.linear(x, m.weight(count, hidden)).softmax(-1)
    up, down = m.weight(count, hidden, inner), m.weight(count, inner, hidden)
    if by == "gather":
        best, which = scores.topk(1, dim=-1)
        rows = x.reshape(-1, 1, hidden)
        y = act(m, rows @ up[which.reshape(-1)]) @ down[which.reshape(-1)]
        return y.reshape(x.shape) * best
    if by == "einsum":
        y = torch.einsum("...ei,eih->...eh", act(m, torch.einsum("...h,ehi->...ei", x, up)), down)
        return (y * _kept(scores, top_1)[..., None]).sum(-2)
    rows = x.reshape(1, -1, hidden)
    inside = torch.bmm(rows.expand(count, -1, -1), up) if by == "bmm" else rows @ up
    y = torch.bmm(act(m, inside), down) if by == "bmm" else act(m, inside) @ down
    mixed = (y * _kept(scores, top_1).reshape(-1, count).t()[..., None]).sum(0)
    return mixed.reshape(x.shape)


def _kept(scores: Tensor, top_1: bool) -> Tensor:
    """Zero for all experts but the best."""
    if not top_1:
        return scores
    best, which = scores.topk(1, dim=-1)
    return torch.zeros_like(scores).scatter(-1, which, best)


# -- activations -----------------------------------------------------------------------------------


@production(Activation, weight=3)
def activation(
    m: Scope, x: Tensor, *, which: Literal["silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "elu"]
) -> Tensor:
    return getattr(F, which)(x)


@production(Activation)
def squared_relu(m: Scope, x: Tensor) -> Tensor:
    return F.relu(x).square()


@production(Activation)
def clamped_swish(m: Scope, x: Tensor) -> Tensor:
    return x.clamp(-2, 2) * torch.sigmoid(1.702 * x)


@production(Activation)
def learnt_slope(m: Scope, x: Tensor) -> Tensor:
    return F.prelu(x.flatten(0, -2), m.weight(x.shape[-1])).reshape(x.shape)
