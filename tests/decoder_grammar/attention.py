"""Attention: projections, norms of queries and keys, positions, caches, and the product in its spellings."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Cache, Kernel, Linear, Mixer, Norm, Packed, Positions, Projection, Trap


@production(Mixer, weight=3)
def attention(
    m: Scope,
    x: Tensor,
    *,
    project: Projection,
    norm: Norm | None,
    positions: Positions | None,
    cache: Cache | None,
    kernel: Kernel,
    inside: Trap | None,
    after: Trap | None,
    gate: bool,
    out: Linear,
) -> Tensor:
    q, k, v = project(m, x)
    if norm:
        q, k = norm(m, q), norm(m, k)
    if inside:
        v = inside(m, v)
    if positions:
        q, k = positions(m, q), positions(m, k)
    if cache:
        k, v = cache(m, k, v)
    y = kernel(m, q, k, v)
    y = after(m, y) if after else y
    y = y.transpose(1, 2).reshape(*x.shape[:-1], -1)
    if gate:
        y = y * torch.sigmoid(F.linear(x, m.weight(y.shape[-1], x.shape[-1])))
    return out(m, y, x.shape[-1])


# -- projections -----------------------------------------------------------------------------------


@production(Projection)
def heads_last(m: Scope, x: Tensor, *, packed: Packed) -> list[Tensor]:
    """One part for all queries, one for all keys, one for all values."""
    s = m.sizes
    parts = packed(m, x, [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim])
    return [part.unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for part in parts]


@production(Projection)
def packed_by_head(m: Scope, x: Tensor, *, linear: Linear, split: bool) -> list[Tensor]:
    """Queries, keys and values of one head next to each other."""
    s = m.sizes
    width = (s.repeats + 2) * s.head_dim
    y = linear(m, x, s.kv_heads * width).view(*x.shape[:-1], s.kv_heads, s.repeats + 2, s.head_dim)
    q, k, v = y.split([s.repeats, 1, 1], dim=-2) if split else (y[..., :-2, :], y[..., -2:-1, :], y[..., -1:, :])
    return [part.flatten(2, 3).transpose(1, 2) for part in (q, k, v)]


@production(Projection)
def split_after_transpose(m: Scope, x: Tensor, *, linear: Linear) -> list[Tensor]:
    """All heads in one axis, which is split."""
    s = m.sizes
    y = linear(m, x, (s.heads + 2 * s.kv_heads) * s.head_dim)
    y = y.view(*x.shape[:-1], -1, s.head_dim).transpose(1, 2)
    return list(y.split([s.heads, s.kv_heads, s.kv_heads], dim=1))


@production(Projection)
def latent(m: Scope, x: Tensor, *, norm: Norm) -> list[Tensor]:
    """Keys and values from one narrow tensor, queries with a part of their own for positions."""
    s = m.sizes
    narrow = norm(m, F.linear(x, m.weight(6, x.shape[-1])))
    y = F.linear(narrow, m.weight(s.kv_heads * 2 * s.head_dim, 6)).unflatten(-1, (s.kv_heads, -1)).transpose(1, 2)
    k, v = y.split(s.head_dim, dim=-1)
    q = F.linear(x, m.weight(s.heads * s.head_dim, x.shape[-1])).unflatten(-1, (s.heads, -1)).transpose(1, 2)
    return [q, k, v]


# -- positions -------------------------------------------------------------------------------------


def _angles(x: Tensor, half: int) -> Tensor:
    return torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3 ** torch.arange(half, dtype=x.dtype)


@production(Positions)
def rotary(m: Scope, x: Tensor, *, partial: bool, order: Literal["halves", "pairs", "complex"]) -> Tensor:
    size = x.shape[-1] // 2 if partial and x.shape[-1] % 4 == 0 else x.shape[-1]
    y, rest = x[..., :size], x[..., size:]
    angles = _angles(x, size // 2)
    if order == "halves":
        cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
        turned = torch.cat((-y[..., size // 2 :], y[..., : size // 2]), -1)
        y = y * cos + turned * sin
    elif order == "pairs":
        even, odd = y[..., ::2], y[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    else:
        turn = torch.polar(torch.ones_like(angles).float(), angles.float())
        pairs = torch.view_as_complex(
            y.float().reshape(*y.shape[:-1], -1, 2).clone(memory_format=torch.contiguous_format)
        )
        y = torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


@production(Positions)
def learnt(m: Scope, x: Tensor, *, per_head: bool) -> Tensor:
    shape = x.shape[-3:] if per_head else x.shape[-2:]
    return x + m.weight(*shape)


@production(Positions)
def temperature(m: Scope, x: Tensor, *, per_head: bool) -> Tensor:
    return x * m.weight(x.shape[1], 1, 1) if per_head else x * m.weight(x.shape[-2], 1)


# -- caches ----------------------------------------------------------------------------------------


@production(Cache)
def appended(m: Scope, k: Tensor, v: Tensor, *, returned: bool) -> tuple[Tensor, Tensor]:
    shape = (*k.shape[:2], 2, k.shape[-1])
    k, v = (torch.cat((m.input(*shape), new), dim=2) for new in (k, v))
    if returned:
        m.outputs += [k, v]
    return k, v


@production(Cache)
def written(m: Scope, k: Tensor, v: Tensor, *, by: Literal["slice", "index_copy", "index"]) -> tuple[Tensor, Tensor]:
    """A static cache, an input that is written in place."""
    found = []
    for new in (k, v):
        tokens = new.shape[2]
        cache = m.input(*new.shape[:2], tokens + 2, new.shape[-1])
        places = torch.arange(tokens) + 1
        if by == "slice":
            cache[:, :, 1 : tokens + 1].copy_(new)
        elif by == "index_copy":
            cache.index_copy_(2, places, new)
        else:
            cache[:, :, places] = new
        found.append(cache)
    return found[0], found[1]


@production(Cache)
def swapped(m: Scope, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys serve as values and the other way round."""
    return v, k


@production(Cache)
def shared(m: Scope, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are the values."""
    return k, k


# -- kernels ---------------------------------------------------------------------------------------


def _repeated(x: Tensor, repeats: int, by: str) -> Tensor:
    if by == "interleave":
        return x.repeat_interleave(repeats, dim=1)
    return x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(x.shape[0], -1, *x.shape[-2:])


@production(Kernel)
def fused(
    m: Scope, q: Tensor, k: Tensor, v: Tensor, *, repeat: Literal["interleave", "expand", "gqa"], mask: bool
) -> Tensor:
    given = m.input(q.shape[0], 1, q.shape[2], k.shape[2]) if mask else None
    if repeat == "gqa":
        return F.scaled_dot_product_attention(q, k, v, given, enable_gqa=True)
    k, v = (_repeated(x, m.sizes.repeats, repeat) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, given, is_causal=not mask)


@production(Kernel)
def written_out(
    m: Scope,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    by: Literal["matmul", "bmm", "einsum", "baddbmm"],
    repeat: Literal["interleave", "expand"],
    scale: Literal["scores", "queries", "both"],
    cap: bool,
    mask: Literal["causal", "none", "input", "positions"],
    sink: bool,
) -> Tensor:
    k, v = (_repeated(x, m.sizes.repeats, repeat) for x in (k, v))
    root = q.shape[-1] ** -0.25
    if scale != "scores":
        q = q * root**2 if scale == "queries" else q * root
        k = k * root if scale == "both" else k
    if by == "matmul":
        scores = q @ k.transpose(-1, -2)
    elif by == "einsum":
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    else:
        flat_q, flat_k = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
        bias = m.input(len(flat_q), 1, k.shape[2]) if by == "baddbmm" else None
        scores = torch.bmm(flat_q, flat_k) if bias is None else torch.baddbmm(bias, flat_q, flat_k)
        scores = scores.unflatten(0, q.shape[:2])
    scores = scores * root**2 if scale == "scores" else scores
    scores = torch.tanh(scores / 5) * 5 if cap else scores
    if mask == "causal":
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -1e4)
    elif mask != "none":
        shape = (q.shape[0], 1, q.shape[2], k.shape[2]) if mask == "input" else (q.shape[1], 1, k.shape[2])
        scores = scores + (m.input(*shape) if mask == "input" else m.weight(*shape))
    if sink:
        sinks = m.weight(q.shape[1])[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)
    weights = weights[..., :-1] if sink else weights
    if by == "einsum":
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)
    return weights @ v


@production(Kernel)
def without_softmax(m: Scope, q: Tensor, k: Tensor, v: Tensor, *, values_first: bool) -> Tensor:
    """Linear attention."""
    k, v = (_repeated(x, m.sizes.repeats, "expand") for x in (k, v))
    return q @ (k.transpose(-1, -2) @ v) if values_first else (q @ k.transpose(-1, -2)) @ v
