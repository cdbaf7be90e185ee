"""What the residual stream goes through."""

from typing import Literal

from torch import Tensor

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Layer, Mixer, Norm, Trap


@production(Layer, weight=4)
def residual(
    m: Scope,
    x: Tensor,
    *,
    norm: Norm,
    mixer: Mixer,
    post_norm: Norm | None,
    scale: Literal["none", "number", "vector", "per token"],
    inside: Trap | None,
) -> Tensor:
    y = norm(m, x)
    y = mixer(m, inside(m, y) if inside else y)
    y = post_norm(m, y) if post_norm else y
    if scale == "number":
        y = 0.5 * y
    elif scale != "none":
        y = y * m.weight(*((x.shape[-1],) if scale == "vector" else (x.shape[-2], 1)))
    return x + y


@production(Layer)
def parallel_residual(m: Scope, x: Tensor, *, norm: Norm, other_norm: Norm | None, one: Mixer, other: Mixer) -> Tensor:
    y = norm(m, x)
    z = other_norm(m, x) if other_norm else y
    return x + one(m, y) + other(m, z)


@production(Layer)
def norm_after_sum(m: Scope, x: Tensor, *, mixer: Mixer, norm: Norm) -> Tensor:
    """As the first transformers had it."""
    return norm(m, x + mixer(m, x))


@production(Layer)
def without_residual(m: Scope, x: Tensor, *, norm: Norm, mixer: Mixer) -> Tensor:
    return mixer(m, norm(m, x))


@production(Layer)
def difference(m: Scope, x: Tensor, *, norm: Norm, mixer: Mixer) -> Tensor:
    return 2 * x - mixer(m, norm(m, x))


@production(Layer)
def updated_in_place(m: Scope, x: Tensor, *, norm: Norm, mixer: Mixer) -> Tensor:
    x += mixer(m, norm(m, x))
    return x


@production(Layer, weight=2)
def trapped(m: Scope, x: Tensor, *, trap: Trap) -> Tensor:
    return trap(m, x)
