"""Running a graph in step: what is computed, how often, and what is kept."""

from __future__ import annotations

import pytest
import torch
from graphs import WIDTH, Decoder, Lambda, captured, linear
from torch import nn

from quarot_fx.calibration.products import shared_inputs
from quarot_fx.calibration.stream import Stream
from quarot_fx.config import QuarotConfig
from quarot_fx.passes.quantize_weights import QuantizeWeights

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
SEQUENCES = [torch.arange(5)[None] + shift for shift in range(3)]


def stream_of(module, wanted, **options):
    """A stream of a module, filled with random values, up to inputs of linear layers, by name of these."""
    program = captured(module, SEQUENCES[0])
    nodes = {node.name: node for node in program.graph.nodes}
    placeholder = next(iter(program.graph.find_nodes(op="placeholder")))
    found = [nodes[name].args[0] for name in wanted]
    return Stream(program.graph, placeholder, SEQUENCES, {placeholder: SEQUENCES[0]}, found, **options), found


@pytest.mark.parametrize("offload", [False, True])
def test_values_are_those_of_the_model(offload):
    module = Decoder()
    stream, (x, last) = stream_of(module, ("linear", "linear_7"), offload=offload)
    stream.advance([x])
    for value, sequence in zip(stream.values(x), SEQUENCES, strict=True):
        torch.testing.assert_close(value, module.block.norm(module.embedding(sequence)))
    stream.forget([x])
    stream.advance([last])
    for value, sequence in zip(stream.values(last), SEQUENCES, strict=True):
        torch.testing.assert_close(value, module.norm(module.block(module.embedding(sequence))))


def test_only_what_is_still_read_is_kept():
    stream, (x, last) = stream_of(Decoder(), ("linear", "linear_7"))
    stream.advance([x])
    kept = {node.name for node in stream._values[0]}
    assert x.name in kept
    assert kept == {node.name for node in stream._values[0] if stream._last_use[node] >= stream._next}
    assert len(kept) == 2  # and the residual stream
    stream.forget([x])
    stream.advance([last])
    stream.forget([last])
    assert not any(stream._values)
    assert not stream._shared


def test_an_input_that_is_wanted_twice_is_kept_until_it_was_forgotten_twice():
    module = Lambda(lambda m, ids: m.a(m.e(ids)) * 2, e=nn.Embedding(16, WIDTH), a=linear(WIDTH))
    stream, (x, _) = stream_of(module, ("linear", "linear"))
    stream.advance([x])
    stream.forget([x])
    assert len(list(stream.values(x))) == 3
    stream.forget([x])
    assert not any(stream._values)


def test_what_does_not_depend_on_tokens_is_computed_once():
    def forward(m, ids):
        positions = torch.arange(ids.shape[1]).float().outer(torch.ones(WIDTH)).cos()
        return m.a(m.e(ids) + positions + torch.zeros_like(ids)[..., None]) * 2

    stream, (x,) = stream_of(Lambda(forward, e=nn.Embedding(16, WIDTH), a=linear(WIDTH)), ("linear",))
    names = {node.name for node in stream._varying}
    assert not names & {"arange", "cos", "zeros_like"}
    assert {"embedding", "add"} <= names
    stream.advance([x])
    assert len({value.data_ptr() for value in stream.values(x)}) == 3


def groups_of(program):
    groups = shared_inputs(program.graph, searched={})
    return [[product.linear.parameter.split(".")[1] for product in group] for group in groups]


def test_layers_that_share_an_input_come_together_and_in_order():
    program = QuantizeWeights(QuarotConfig(w_rounding="gptq"))(captured(Decoder(), SEQUENCES[0]))
    assert groups_of(program) == [["query", "key", "value"], ["output"], ["gate", "up"], ["down"]]
    overrides = {"*.key": {"w_rounding": "nearest"}, "*.up": "skip"}
    program = QuantizeWeights(QuarotConfig(w_rounding="gptq", overrides=overrides))(captured(Decoder(), SEQUENCES[0]))
    assert groups_of(program) == [["query", "value"], ["output"], ["gate"], ["down"]]
