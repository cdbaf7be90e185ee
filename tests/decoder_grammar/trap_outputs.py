"""Traps that let others see: the stream itself, again, as a view, or what was computed of it."""

from typing import Literal

from torch import Tensor

from decoder_grammar.grammar import production
from decoder_grammar.scope import Scope
from decoder_grammar.symbols import Linear, Norm, Trap


@production(Trap)
def returned(m: Scope, x: Tensor, *, how: Literal["once", "twice", "transposed", "part", "flat", "negated"]) -> Tensor:
    m.outputs += {
        "once": lambda: [x],
        "twice": lambda: [x, x],
        "transposed": lambda: [x.transpose(0, -1)],
        "part": lambda: [x[..., 0]],
        "flat": lambda: [x.reshape(-1)],
        "negated": lambda: [-x],
    }[how]()
    return x


@production(Trap)
def read_aside(m: Scope, x: Tensor, *, norm: Norm, linear: Linear) -> Tensor:
    """Another head."""
    m.outputs.append(linear(m, norm(m, x), 3))
    return x


@production(Trap)
def compared(m: Scope, x: Tensor, *, by: Literal["argmax", "any", "length"]) -> Tensor:
    m.outputs.append({"argmax": x.argmax, "any": (x > 0.5).any, "length": x.square().sum}[by](-1))
    return x
