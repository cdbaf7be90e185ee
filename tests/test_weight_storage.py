"""Weights that are views, or shared: what a parameter's memory looks like is nobody's business but its own."""

from __future__ import annotations

import pytest
import torch
from architectures import compile_model
from graphs import Decoder, Lambda, fill, linear, rms_norm, tokens
from torch import nn
from torch.nn import functional as F

import quarot_fx
from quarot_fx.float64 import relative_difference

IDS = torch.arange(10).reshape(2, 5)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def transposed(weight):
    """The same matrix, stored by columns."""
    return nn.Parameter(weight.detach().t().contiguous().t())


def sliced(weight):
    """The same matrix as a part of a bigger one."""
    bigger = torch.full((weight.shape[0] + 3, 2 * weight.shape[1] + 1), torch.nan, dtype=weight.dtype)
    part = bigger[2:-1, 1::2]
    return nn.Parameter(part.copy_(weight.detach()))


def with_weights(model, change):
    """Replace the weights of all linear layers and of the embedding."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = change(module.weight)
    return model


def assert_rotates(model, *inputs, tolerance=1e-9):
    """Rotated as eager, quantised finite; and as ever after an update in place."""
    model = model.double()
    rotated, quantized = compile_model(model, stop_after="rotate"), compile_model(model)
    assert relative_difference([rotated(*inputs)], [model(*inputs)]) < tolerance
    assert quantized(*inputs).isfinite().all()
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert relative_difference([rotated(*inputs)], [model(*inputs)]) < tolerance


@pytest.mark.parametrize("change", [transposed, sliced])
def test_strides(change):
    model = with_weights(fill(Decoder()).double(), change)
    assert not model.head.weight.is_contiguous()
    assert_rotates(model, IDS)


@pytest.mark.parametrize("change", [transposed, sliced])
def test_strides_do_not_change_a_code(change):
    plain, strided = fill(Decoder()), with_weights(fill(Decoder()), change)
    assert torch.equal(quarot_fx.rewrite(strided, IDS)(IDS)[0], quarot_fx.rewrite(plain, IDS)(IDS)[0])


def test_parts_of_one_big_tensor():
    """Query, key and value are three views of one storage."""
    model = fill(Decoder()).double()
    packed = torch.cat([getattr(model.block, name).weight.detach() for name in ("query", "key", "value")])
    for name, part in zip(("query", "key", "value"), packed.chunk(3), strict=True):
        getattr(model.block, name).weight = nn.Parameter(part)
    assert_rotates(model, IDS)


def test_layers_that_share_all_their_weights():
    model = Lambda(lambda m, x: m.block(m.block(x)), block=nn.Sequential(nn.RMSNorm(16, eps=1e-6), linear(16)))
    assert_rotates(fill(model), tokens().double())


def test_layers_that_share_a_weight_behind_other_gains():
    def function(m, x):
        return m.a(rms_norm(x, m.g)) + m.a(rms_norm(x.sin(), m.h)) + F.linear(x, m.a.weight)

    assert_rotates(fill(Lambda(function, a=linear(16), g=16, h=16)), tokens().double())


def test_two_modules_with_one_parameter():
    first, second = linear(16), linear(16)
    second.weight = first.weight
    assert_rotates(fill(Lambda(lambda m, x: m.b(m.a(x).relu()), a=first, b=second)), tokens().double())


def test_one_parameter_under_different_views():
    """As it is, transposed, and in parts; one use is quantised in its rows, another in its columns."""

    def function(m, x):
        up = F.linear(x.sin(), m.w)  # [32, 16]
        down = F.linear(up.relu(), m.w.t())
        return down + x.cos() @ m.w[:16] + F.linear(x.tanh(), m.w.view(2, 16, 16)[1])

    assert_rotates(fill(Lambda(function, w=(32, 16))), tokens().double())


def test_head_that_is_the_transposed_embedding():
    def function(m, ids):
        x = F.embedding(ids, m.w)
        return rms_norm(x + m.a(rms_norm(x, m.g)), m.h) @ m.w.t()

    assert_rotates(fill(Lambda(function, w=(16, 16), a=linear(16), g=16, h=16)), IDS)


def test_one_tensor_as_two_parameters():
    """Two parameters of one storage: an update through one is seen through the other."""
    model = fill(Lambda(lambda m, x: m.b(m.a(x).relu()), a=linear(16), b=linear(16))).double()
    model.b.weight = nn.Parameter(model.a.weight.detach().t())
    rotated = compile_model(model, stop_after="rotate")
    x = tokens().double()
    assert relative_difference([rotated(x)], [model(x)]) < 1e-9
    with torch.no_grad():
        model.a.weight.mul_(1.5)
    assert relative_difference([rotated(x)], [model(x)]) < 1e-9


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_weights_read_before_any_input(reads):
    """The first nodes of such a graph are weights, which become inputs of the compiled one."""
    weights = {f"w{i}": (16, 16) for i in range(reads)}
    model = fill(Lambda(lambda m, x: sum(getattr(m, name).sin() for name in weights) @ x.mT + m.a(x).sum(), **weights,
                        a=linear(6)))  # fmt: skip
    assert_rotates(model, tokens().double())
