"""Programs in which fuzzing found a mistake, made as small as they can be, and checked as drawn programs are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from decoder_grammar.trap_writes import write
from graphs import WIDTH, Lambda, captured, difference, linear, rms_norm, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from quarot_fx.config import QuarotConfig
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline

SQUARE = (WIDTH, WIDTH)
ROWS = 6  # of `flat`
CASES: dict[str, Lambda] = {}


def case(**parts: object) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter a function of a module with these parts, and of activations [2, 3, WIDTH]."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES[function.__name__] = Lambda(function, **parts)
        return function

    return enter


def flat(x: Tensor) -> Tensor:
    return x.reshape(ROWS, WIDTH)


# -- fold-biases, fold-gains -----------------------------------------------------------------------


@case(shift=WIDTH, bias=WIDTH, weight=SQUARE)
def bias_before_a_scaled_addmm(m: Lambda, x: Tensor) -> Tensor:
    return torch.addmm(m.bias, flat(rms_norm(x, m.shift) + m.shift), m.weight, beta=3, alpha=2)


@case(shift=WIDTH, bias=(ROWS, 1), weight=SQUARE)
def bias_before_an_addmm_that_adds_a_column(m: Lambda, x: Tensor) -> Tensor:
    return torch.addmm(m.bias, flat(x + m.shift), m.weight)


@case(shift=WIDTH, layer=linear(8))
def bias_of_a_wider_type(m: Lambda, x: Tensor) -> Tensor:
    return m.layer(x.half() + m.shift)


@case(shift=(1, 1, 1, WIDTH), layer=linear(8))
def bias_with_more_axes(m: Lambda, x: Tensor) -> Tensor:
    return m.layer(x + m.shift)


@case(gain=(1, 1, 1, WIDTH), layer=linear(8))
def gain_with_more_axes(m: Lambda, x: Tensor) -> Tensor:
    return m.layer(x * m.gain)


@case(gain=SQUARE, layer=linear(WIDTH))
def gain_computed_after_the_layer_that_takes_it(m: Lambda, x: Tensor) -> Tensor:
    return F.silu(m.layer(x) * m.gain[0])


# -- split-packed-linears, recognize-norms ---------------------------------------------------------


@case(bias=2 * WIDTH, weight=(WIDTH, 2 * WIDTH))
def packed_addmm_that_scales(m: Lambda, x: Tensor) -> Tensor:
    one, other = torch.addmm(m.bias, flat(x), m.weight, beta=3, alpha=-2).split(WIDTH, -1)
    return one - F.silu(other)


@case(bias=1, weight=(WIDTH, 2 * WIDTH))
def packed_addmm_that_adds_a_number(m: Lambda, x: Tensor) -> Tensor:
    one, other = torch.addmm(m.bias, flat(x), m.weight).split(WIDTH, -1)
    return one - F.silu(other)


@case(layer=linear(8))
def mean_of_a_wider_type(m: Lambda, x: Tensor) -> Tensor:
    x = x.half()
    return m.layer(x - x.mean(-1, keepdim=True, dtype=torch.float32))


# -- rules -----------------------------------------------------------------------------------------


class Numbers(nn.Module):
    """A buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.arange(3 * WIDTH).reshape(3, WIDTH) ** 2 % 7)


@case(stored=Numbers(), first=linear(WIDTH), second=linear(WIDTH))
def integers_added(m: Lambda, x: Tensor) -> Tensor:
    return m.second(m.first(x) + m.stored.numbers)


# -- operators that write in place and that nobody knows -------------------------------------------


@case(layer=linear(WIDTH + 4))
def one_of_two_overlapping_parts_is_written(m: Lambda, x: Tensor) -> Tensor:
    packed = m.layer(x)
    one, other = packed[..., :WIDTH], packed[..., 4:]
    write(one)
    return one - F.silu(other)


@case(layer=linear(WIDTH))
def squares_are_written_before_their_mean(m: Lambda, x: Tensor) -> Tensor:
    squares = x.pow(2)
    write(squares)
    return m.layer(x * squares.mean(-1, keepdim=True))


@case(layer=linear(WIDTH))
def squared_tensor_is_written_before_the_mean(m: Lambda, x: Tensor) -> Tensor:
    x = x * 2
    squares = x.pow(2)
    write(x)
    return m.layer(x * squares.mean(-1, keepdim=True))


@case(layer=linear(WIDTH))
def tensor_is_written_between_its_mean_and_the_centring(m: Lambda, x: Tensor) -> Tensor:
    x = x * 2
    mean = x.mean(-1, keepdim=True)
    write(x)
    return m.layer(x - mean)


@case(gain=WIDTH, layer=linear(WIDTH))
def tensor_is_written_after_its_gain(m: Lambda, x: Tensor) -> Tensor:
    x = x * 2
    scaled = x * m.gain
    write(x)
    return m.layer(scaled) + x


@case(shift=WIDTH, layer=linear(WIDTH))
def tensor_is_written_after_its_bias(m: Lambda, x: Tensor) -> Tensor:
    x = x * 2
    shifted = x + m.shift
    write(x)
    return m.layer(shifted) + x


# -- the check -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("fresh_dynamo")
def test_counterexample(name: str) -> None:
    program = captured(CASES[name], tokens())
    passes = build_pipeline(QuarotConfig(stop_after="rotate"))
    exact = [one for one in passes if not isinstance(one, FoldConstants)]  # which rounds to float32
    assert difference(run_pipeline(program, exact), program, tokens()) < 1e-9
    outputs = [run_pipeline(program, passes).graph_module(tokens()), program.graph_module(tokens())]
    for output, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
