import pytest
import torch
from graphs import Lambda, apply, captured, exported, linear, reasons, tokens
from models import random_token_ids, tiny_model
from transformers import StaticCache

import quarot_fx
from quarot_fx.passes.compute_once import FEWEST_READERS, ComputeOnce

KEPT = "as_strided"


def kept(program):
    return [node.args[0].target.name() for node in program.graph.nodes if KEPT in str(node.target)]


def angles(count):
    return torch.arange(3)[:, None] * 0.1 ** torch.arange(count)


def transposed_angles():
    return (0.1 ** torch.arange(16)[:, None] * torch.arange(3)).mT


def reading(function, readers=FEWEST_READERS):
    """Apply the pass to products of a layer's results with what a function makes of nothing."""

    def forward(m, x):
        table = function()
        for _ in range(readers):
            x = m.layer(x) * table
        return x

    return apply(ComputeOnce(), captured(Lambda(forward, layer=linear(16)), tokens()), tokens())


def test_angles_that_layers_read_are_kept():
    result, report = reading(lambda: angles(16).cos())
    assert (report.matched, kept(result)) == (1, ["aten::cos"])


def test_views_of_them_are_views_of_what_is_kept():
    def forward(m, x):
        table = angles(16).sin()
        for _ in range(FEWEST_READERS):
            x = m.layer(x) * table.unsqueeze(0).expand(2, 3, 16)
        return x

    result, report = apply(ComputeOnce(), captured(Lambda(forward, layer=linear(16)), tokens()), tokens())
    assert (report.matched, kept(result)) == (1, ["aten::sin"])


@pytest.mark.parametrize(
    ("why", "function", "readers"),
    [
        ("one layer reads it", lambda: angles(16).cos(), 2),
        ("one number", lambda: torch.arange(1.0).cos(), FEWEST_READERS),
        ("places, not angles", lambda: torch.arange(16) + 1, FEWEST_READERS),
        ("laid out another way than it would be kept", lambda: transposed_angles().cos(), FEWEST_READERS),
    ],
)
def test_what_is_cheaper_computed_again_is(why, function, readers):
    result, report = reading(function, readers)
    assert (report.matched, kept(result)) == (0, []), why


def test_what_depends_on_activations_stays_with_them():
    def forward(m, x):
        gate = m.layer(x).cos()
        return x * gate + (x + 1) * gate + (x + 2) * gate

    result, _ = apply(ComputeOnce(), captured(Lambda(forward, layer=linear(16)), tokens()), tokens())
    assert kept(result) == []


def test_random_numbers_are_not_moved():
    def forward(m, x):
        noise = torch.rand(16).cos()
        return x * noise + (x + 1) * noise + (x + 2) * noise

    (report,) = ComputeOnce()(exported(Lambda(forward), tokens())).reports
    assert report.matched == 0


def test_unknown_sizes_are_named():
    def forward(m, x):
        table = torch.arange(x.shape[1])[:, None].cos()
        return x.tanh() * table + x.exp() * table + x.sin() * table

    program = exported(Lambda(forward), tokens(), dynamic=[1])
    _, report = apply(ComputeOnce(), program, tokens())
    (reason,) = reasons(report)
    assert "has sizes that are known only at run time" in reason


def test_a_decoder_keeps_its_angles_and_its_mask():
    model = tiny_model("llama", num_hidden_layers=3)
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(1, model.config.num_key_value_heads, model.config.head_dim, torch.float32, "cpu")
    inputs = {"input_ids": random_token_ids(1, 1), "past_key_values": cache}
    graph_module = quarot_fx.rewrite(model, inputs, kernels="reference", kv_bits=16)
    # The mask, and cosines and sines where they are cast to the dtype of the model.
    assert sorted(kept(graph_module)) == ["aten::le.Tensor", "aten::to.dtype", "aten::to.dtype"]
    readers = {node: len(node.users) for node in graph_module.graph.nodes if KEPT in str(node.target)}
    assert set(readers.values()) == {3}
