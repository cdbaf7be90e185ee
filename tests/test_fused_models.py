"""Whole models, their nodes fused into ops with kernels: which ops there are then, and that they compute the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, compile_model
from models import random_token_ids

import quarot_fx
from quarot_fx.float64 import relative_difference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"w_bits": 8, "a_bits": 8, "kv_bits": 8}  # so that one code that flips is seen as little as it should be
FLIPS = 1e-2
BY_NAME = {row.model_type: row for row in ARCHITECTURES}
# Of each layer. Norms: before attention and the MLP. Rotations: after attention and within the MLP.
GATED = {"norm_quantize": 2, "rotate_quantize": 2, "rope_rotate": 2, "int_linear": 3, "gated_int_linear": 1}
EACH = {
    **dict.fromkeys(("llama", "qwen3", "gemma", "phi3"), GATED),
    "gemma2": GATED | {"norm_quantize": 0, "rotate_quantize": 4},  # norms are rotated before they are quantised
    "phi": {"norm_quantize": 1, "rotate_quantize": 2, "int_linear": 3},  # embeds a part of each head
    "opt": {"norm_quantize": 2, "rotate_quantize": 2, "int_linear": 4},
    "gpt2": {"norm_quantize": 2, "rotate_quantize": 2, "int_linear": 4},
}
OPS = {*GATED, "quantize_activation"}


def operators(graph_module):
    """How often a graph calls each of our ops."""
    names = [str(node.target).split(".") for node in graph_module.graph.nodes]
    return Counter(name[1] for name in names if name[0] == "quarot")


@pytest.mark.parametrize("name", EACH)
def test_ops_of_a_model(name):
    model, ids = BY_NAME[name].build(), random_token_ids(2, 7)
    fused = quarot_fx.rewrite(model, ids, kernels="reference", **OPTIONS)
    called = operators(fused)
    assert {op: called[op] for op in OPS} == {op: LAYERS * EACH[name].get(op, 0) for op in OPS}
    with torch.no_grad():
        expected = quarot_fx.rewrite(model, ids, kernels="none", **OPTIONS)(ids)
        assert relative_difference([fused(ids)[-1]], [expected[-1]]) < FLIPS


@pytest.mark.parametrize("kernels", ["reference", pytest.param("auto", marks=pytest.mark.kernels)])
def test_norms_of_one_token_are_part_of_products(kernels):
    if kernels == "auto":
        pytest.importorskip("triton")
    model, ids = BY_NAME["llama"].build().to(DEVICE), random_token_ids(1, 1).to(DEVICE)
    fused = quarot_fx.rewrite(model, ids, kernels=kernels)
    names = [str(node.target).split(".")[1] for node in fused.graph.nodes if str(node.target).startswith("quarot")]
    assert (names.count("norm_int_linear"), names.count("norm_quantize")) == (2 * LAYERS, 0)
    with torch.no_grad():
        expected = quarot_fx.rewrite(model, ids, kernels="none")(ids)
        assert relative_difference([fused(ids)[-1]], [expected[-1]]) < FLIPS


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_kernels_agree_with_the_references(name):
    pytest.importorskip("triton")
    model, ids = BY_NAME[name].build().to(DEVICE), random_token_ids(1, 5).to(DEVICE)
    fused = quarot_fx.rewrite(model, ids, **OPTIONS)
    called = Counter(str(node.target) for node in fused.graph.nodes)
    assert {op: called[f"quarot_triton.{op}.default"] for op in EACH[name]} == {
        op: LAYERS * count for op, count in EACH[name].items()
    }
    with torch.no_grad():
        expected = quarot_fx.rewrite(model, ids, kernels="reference", **OPTIONS)(ids)
        assert relative_difference([fused(ids)[-1]], [expected[-1]]) < FLIPS


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The rewritten graphs that a nested backend called ``recording`` compiles."""
    recorded = []

    def recording(graph_module, inputs):
        recorded.append(graph_module)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    torch._dynamo.list_backends()  # entry points are looked for once, and must not be lost with the copies below
    registry = torch._dynamo.backends.registry
    for name in ("_COMPILER_FNS", "_BACKENDS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    torch._dynamo.register_backend(recording)
    return recorded


@pytest.mark.slow
def test_sizes_may_change_and_so_may_numbers_of_modules(graphs, compiled_graphs):
    model = BY_NAME["llama"].build()
    simulated = compile_model(model, dynamic=True, kernels="none", **OPTIONS)
    fused = compile_model(model, dynamic=True, kernels="reference", nested_backend="recording", **OPTIONS)

    def logits(length):
        ids = random_token_ids(2, length)
        with torch.no_grad():
            found, expected = (one(ids, use_cache=False).logits for one in (fused, simulated))
        assert relative_difference([found], [expected]) < FLIPS
        return found

    logits(7)
    before = logits(11)
    assert graphs() == 2  # one of each
    for graph_module in compiled_graphs:  # Dynamo may start again to make some number static
        called = operators(graph_module)
        assert {op: called[op] for op in EACH["llama"]} == {op: LAYERS * count for op, count in EACH["llama"].items()}
        assert not graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)

    model.model.layers[1].input_layernorm.variance_epsilon = 10.0  # Dynamo makes such numbers symbols
    assert relative_difference([logits(11)], [before]) > 10 * FLIPS


def test_a_fused_output_head_is_still_told(monkeypatch):
    monkeypatch.setattr("quarot_fx.passes.fuse_float_linears.FEWEST_WEIGHTS", 1)
    model, ids = BY_NAME["llama"].build(), random_token_ids(1, 1)
    fused = quarot_fx.rewrite(model, ids, kernels="reference")
    assert operators(fused)["float_linear"] == 1
    told = [
        {(one.parameter, one.w_bits, one.role) for one in quarot_fx.explain(model, ids, kernels=kernels).linears}
        for kernels in ("reference", "none")
    ]
    assert told[0] == told[1]
    assert any(bits == 16 and role == "head" for _, bits, role in told[0])
