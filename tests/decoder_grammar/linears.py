"""Linear layers in every spelling, and packed ones."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Linear, Packed


@production(Linear, weight=3)
def linear(m: Scope, x: Tensor, out: int, *, bias: bool) -> Tensor:
    return F.linear(x, m.weight(out, x.shape[-1]), m.weight(out) if bias else None)


@production(Linear)
def tied_linear(m: Scope, x: Tensor, out: int) -> Tensor:
    """With a weight that something else has already."""
    return F.linear(x, m.tied(out, x.shape[-1]))


@production(Linear, weight=2)
def addmm(
    m: Scope,
    x: Tensor,
    out: int,
    *,
    bias: Literal["vector", "number", "matrix", "column", "input"],
    beta: Literal[1, 3],
    alpha: Literal[1, -2],
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    shape = {"number": (1,), "column": (len(rows), 1), "vector": (out,)}.get(bias, (len(rows), out))
    added = m.input(*shape) if bias == "input" else m.weight(*shape)
    y = torch.addmm(added, rows, m.weight(x.shape[-1], out), beta=beta, alpha=alpha)
    return y.reshape(*x.shape[:-1], out)


@production(Linear, weight=2)
def matmul(m: Scope, x: Tensor, out: int, *, transposed: bool, bias: bool) -> Tensor:
    y = x @ m.weight(out, x.shape[-1]).t() if transposed else x @ m.weight(x.shape[-1], out)
    return y + m.weight(out) if bias else y


@production(Linear)
def einsum(m: Scope, x: Tensor, out: int) -> Tensor:
    return torch.einsum("...i,io->...o", x, m.weight(x.shape[-1], out))


@production(Linear)
def weight_on_the_left(m: Scope, x: Tensor, out: int) -> Tensor:
    return (m.weight(out, x.shape[-1]) @ x.transpose(-1, -2)).transpose(-1, -2)


@production(Linear)
def scaled_linear(m: Scope, x: Tensor, out: int, *, scale: Literal["of rows", "of columns", "of all"]) -> Tensor:
    """The weight is itself computed, as adapters and weight norms do."""
    w = m.weight(out, x.shape[-1])
    by = {"of rows": (out, 1), "of columns": (x.shape[-1],), "of all": (1,)}[scale]
    return F.linear(x, w * m.weight(*by))


@production(Linear)
def low_rank(m: Scope, x: Tensor, out: int) -> Tensor:
    """A weight with an adapter."""
    adapted = F.linear(F.linear(x, m.weight(2, x.shape[-1])), m.weight(out, 2))
    return F.linear(x, m.weight(out, x.shape[-1])) + 0.5 * adapted


@production(Linear)
def batched(m: Scope, x: Tensor, out: int, *, added: bool) -> Tensor:
    """One matrix for every entry of the first axis, by ``bmm`` or ``baddbmm``."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    w = m.weight(x.shape[0], x.shape[-1], out)
    y = torch.baddbmm(m.weight(x.shape[0], 1, out), rows, w, beta=2, alpha=3) if added else torch.bmm(rows, w)
    return y.reshape(*x.shape[:-1], out)


@production(Linear)
def convolution(m: Scope, x: Tensor, out: int) -> Tensor:
    """Of width 1, as old models spell their linear layers."""
    rows = x.reshape(-1, x.shape[-1], 1)
    return F.conv1d(rows, m.weight(out, x.shape[-1], 1), m.weight(out)).reshape(*x.shape[:-1], out)


# -- packed ----------------------------------------------------------------------------------------


@production(Packed)
def separate(m: Scope, x: Tensor, sizes: list[int], *, one: Linear) -> list[Tensor]:
    return [one(m, x, size) for size in sizes]


@production(Packed)
def split(m: Scope, x: Tensor, sizes: list[int], *, one: Linear, slices: bool) -> list[Tensor]:
    packed = one(m, x, sum(sizes))
    if not slices:
        return list(packed.split(sizes, dim=-1))
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [packed[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]


@production(Packed)
def overlapping(m: Scope, x: Tensor, sizes: list[int], *, one: Linear) -> list[Tensor]:
    """Parts that share rows of the weight."""
    packed = one(m, x, max(sizes) + 1)
    return [packed[..., place % 2 : size + place % 2] for place, size in enumerate(sizes)]


@production(Packed)
def interleaved(
    m: Scope, x: Tensor, sizes: list[int], *, one: Linear, by: Literal["step", "view", "unbind"]
) -> list[Tensor]:
    """Parts in turn, element by element."""
    if len(set(sizes)) > 1:
        return [one(m, x, size) for size in sizes]
    count = len(sizes)
    packed = one(m, x, sum(sizes))
    if by == "step":
        return [packed[..., place::count] for place in range(count)]
    viewed = packed.unflatten(-1, (sizes[0], count))
    return list(viewed.unbind(-1)) if by == "unbind" else [viewed[..., place] for place in range(count)]


@production(Packed)
def stacked(
    m: Scope, x: Tensor, sizes: list[int], *, one: Linear, by: Literal["chunk", "select", "permute", "lead"]
) -> list[Tensor]:
    """Parts one after the other, told apart by a view."""
    if len(set(sizes)) > 1:
        return [one(m, x, size) for size in sizes]
    packed = one(m, x, sum(sizes))
    if by == "chunk":
        return list(packed.chunk(len(sizes), dim=-1))
    if by == "lead":
        flat = packed.reshape(-1, sum(sizes))
        return [part.reshape(*x.shape[:-1], -1) for part in flat.split(sizes[0], dim=1)]
    viewed = packed.reshape(*x.shape[:-1], len(sizes), sizes[0])
    if by == "permute":
        return list(viewed.movedim(-2, 0).unbind(0))
    return [viewed.select(-2, place) for place in range(len(sizes))]
