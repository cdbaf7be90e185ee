"""Signal to quantisation noise: against a calculation by hand, and what is known of bits, outliers and rotation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from graphs import captured, tokens
from models import random_token_ids, tiny_model
from torch import nn

import quarot_fx
from quarot_fx.config import QuantScheme
from quarot_fx.errors import UnboundParameterError
from quarot_fx.float64 import run_in_float64
from quarot_fx.graph import Inserter
from quarot_fx.passes.quantized import insert_quantized, requantized

IDS = {"input_ids": random_token_ids(2, 24), "use_cache": False}


class TwoLinears(nn.Module):
    """``b(tanh(a(x)))``: no norm, no gain, nothing to fold."""

    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def rounded(x, scale_dtype=torch.float64):
    """Round the last axis to 4 bits, symmetric, one scale for all of it."""
    scale = (x.abs().amax(-1, keepdim=True) / 7).to(scale_dtype).to(x.dtype)
    return (x / scale).round() * scale


@torch.no_grad()
def decibels(x, y):
    return 20 * math.log10(x.norm() / (x - y).norm())


def test_ratios_are_those_computed_by_hand():
    torch.manual_seed(0)
    model, x = TwoLinears().eval(), torch.randn(3, 5, 16)
    report = quarot_fx.sqnr(model, x, rotation="none", w_clip=1.0, a_clip=1.0)
    model, x = model.double(), x.double()
    entering = {"a.weight": x, "b.weight": torch.tanh(model.a(x))}
    assert [layer.linear.parameter for layer in report.layers] == list(entering)
    for layer, linear in zip(report.layers, (model.a, model.b), strict=True):
        x, weight = entering[layer.linear.parameter], linear.weight
        rounded_weight = rounded(weight, torch.bfloat16)
        expected, actual = linear(x), rounded(x) @ rounded_weight.T + linear.bias
        assert layer.weight == pytest.approx(decibels(weight, rounded_weight))
        assert layer.activation == pytest.approx(decibels(x, rounded(x)))
        assert layer.output == pytest.approx(decibels(expected, actual))
        torch.testing.assert_close(layer.ranges, x.abs().amax((0, 1)))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_a_bit_is_six_decibels(model_type):
    model = tiny_model(model_type)
    unclipped = {"a_clip": 1.0, "kv_clip": 1.0}  # what is clipped stays clipped, whatever the bits
    four, eight = (quarot_fx.sqnr(model, IDS, w_bits=b, a_bits=b, kv_bits=b, **unclipped) for b in (4, 8))
    gained = 20 * math.log10(127 / 7)
    for few, many in zip(four.layers, eight.layers, strict=True):
        for column in ("weight", "activation", "output"):
            ratio = getattr(few, column)
            if few.linear.role:
                assert ratio is getattr(many, column) is None
            else:
                assert getattr(many, column) - ratio == pytest.approx(gained, abs=3)
    for few, many in zip(four.caches, eight.caches, strict=True):
        assert many.sqnr - few.sqnr == pytest.approx(20 * math.log10(255 / 15), abs=3)


def test_a_rotation_spreads_an_outlier_channel():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 100
    rotated, unrotated = (quarot_fx.sqnr(model, IDS, rotation=rotation) for rotation in ("hadamard", "none"))
    after, before = rotated.layers[0], unrotated.layers[0]
    assert before.linear.parameter == after.linear.parameter == "model.layers.0.self_attn.q_proj.weight"
    assert (before.linear.rotated, after.linear.rotated) == ("no", "free")
    assert before.ranges.argmax() == 7
    assert before.ranges.max() / before.ranges.median() > 5
    assert after.ranges.max() / after.ranges.median() < 3
    assert after.activation > before.activation + 5
    assert after.output > before.output + 3


def test_layers_do_not_hear_of_each_others_errors():
    model = tiny_model("llama")
    alone = quarot_fx.sqnr(model, IDS, overrides={"*.layers.0.*": "skip"}).layers
    among = quarot_fx.sqnr(model, IDS).layers
    assert alone[0].weight is alone[0].activation is alone[0].output is None
    places = [place for place, layer in enumerate(among) if ".layers.1." in layer.linear.parameter]
    assert len(places) == 7
    for place in places:
        assert alone[place].output == pytest.approx(among[place].output)


def test_attention_in_another_spelling_reads_the_same_keys_and_values():
    fused = quarot_fx.sqnr(tiny_model("llama"), IDS).caches
    written_out = quarot_fx.sqnr(tiny_model("llama", attn_implementation="eager"), IDS).caches
    assert [one.cache.kind for one in fused] == ["key", "value"] * 2
    for one, other in zip(fused, written_out, strict=True):
        assert one.sqnr == pytest.approx(other.sqnr, rel=1e-4)


def test_it_reads_as_a_table_and_as_json():
    report = quarot_fx.sqnr(tiny_model("llama"), IDS)
    text, data = str(report), json.loads(json.dumps(report.as_dict()))
    first = data["layers"][0]
    assert first["parameter"] == "model.layers.0.self_attn.q_proj.weight"
    assert (first["w_bits"], first["a_bits"], first["rotated"]) == (4, 4, "free")
    assert f"{first['output']:.1f}" in text
    assert "model.layers.*.mlp.down_proj.weight" in text
    assert "model.layers.1.self_attn values" in text
    assert {one["bits"] for one in data["caches"]} == {4}


def test_an_exported_program_has_what_the_model_has():
    torch.manual_seed(0)
    model, x = TwoLinears().eval(), torch.randn(3, 16)
    of_graph = quarot_fx.sqnr(torch.export.export(model, (x,)), x).as_dict()
    of_model = quarot_fx.sqnr(model, x).as_dict()
    for one, other in zip(of_graph["layers"], of_model["layers"], strict=True):
        assert {key: one[key] for key in ("weight", "activation", "output")} == pytest.approx(
            {key: other[key] for key in ("weight", "activation", "output")}
        )


def test_without_weights_there_is_nothing_to_measure():
    with torch.device("meta"):
        model = TwoLinears().eval()
    with pytest.raises(UnboundParameterError, match=r"'a\.weight' is on the meta device"):
        quarot_fx.sqnr(model, torch.randn(3, 16, device="meta"))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_another_tensor_is_quantised_as_a_node_was(dim, symmetric):
    program = captured(TwoLinears(), tokens())
    (x,), output = program.graph.find_nodes(op="placeholder"), program.graph.output_node()
    with program.graph.inserting_before(output):
        insert = Inserter(program.graph, "test", x)
        node = insert_quantized(insert, x, QuantScheme(4, None, symmetric, 0.9), dim)
        program.graph.output((node,))
        program.graph.erase_node(output)
    program.graph_module.recompile()
    (expected,) = run_in_float64(program.graph_module, tokens())
    assert torch.equal(requantized(tokens().double(), node), expected)
    assert not torch.equal(expected, tokens().double())
    assert requantized(tokens(), x) is not expected
