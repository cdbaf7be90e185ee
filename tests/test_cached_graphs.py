"""Graphs of models with a cache of few bits: the plan, the same weights as without a cache, and the same logits."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, ONE_OF_A_KIND, compile_model
from caches import SimulatedCache, double_model, logits_in_chunks, make
from models import random_token_ids
from plans import readers_of_online_transforms
from tiny_decoders import build as build_tiny
from transformers import StaticCache

import quarot_fx
from quarot_fx.basis.plan import RotationPlan
from quarot_fx.float64 import relative_difference

BATCH, PROMPT, CHUNK, ROOM = 2, 10, 3, 16  # longer than the window of those that have one
LENGTH = PROMPT + CHUNK + 1
SIZES = {"prompt": PROMPT, "chunk": CHUNK, "decode": 1}
BY_NAME = {row.model_type: row for row in ARCHITECTURES}

pytestmark = pytest.mark.usefixtures("graphs")


def build(row):
    model = row.build().double()
    model.set_experts_implementation("batched_mm")  # eager torch has no grouped product in float64
    return model


def rewritten(model, cache, stage, **options):
    """Rewrite one graph of a model: that of a prompt, or of what follows it."""
    ids = random_token_ids(BATCH, LENGTH)
    start = 0 if stage == "prompt" else PROMPT
    if start and cache.get_seq_length() == 0:
        logits_in_chunks(model, cache, ids[:, :start], start)
    positions = torch.arange(start, start + SIZES[stage]).expand(BATCH, -1)
    inputs = {"input_ids": ids[:, positions[0]], "position_ids": positions, "past_key_values": cache}
    return quarot_fx.rewrite(model, inputs, **options)


def readers(graph):
    """Who reads each online transform. New keys and values enter the cache, and attention reads them there."""
    found = readers_of_online_transforms(graph)
    return Counter(name.removesuffix(" output") if name.startswith(("key", "value")) else name for name in found)


@pytest.mark.parametrize("stage", [pytest.param("prompt", marks=pytest.mark.slow), "decode"])
@pytest.mark.parametrize("row", ONE_OF_A_KIND)
def test_plan_is_that_of_a_graph_without_a_cache(row, stage):
    """Weights absorb both transforms of values; new keys are transformed, and queries, as without a cache."""
    model = build(row)
    module = rewritten(model, make("static", model, ROOM, BATCH), stage, check=True)
    report = module.quarot
    assert readers(module.graph) == Counter([" ".join(sorted(group.split())) for group in row.online] * LAYERS)
    assert all(one.is_identity for one in report.plan.given)
    assert len(report.plan.given) == 4 * LAYERS
    assert {(cache.kind, cache.bits, cache.by, cache.rotated) for cache in report.caches} == {
        ("key", 4, "cache", row.keys),
        ("value", 4, "cache", row.values),
    }
    assert max(one.difference for one in report.passes if one.name in ("place-rotations", "rotate")) < 1e-9
    assert report.plan.barriers == row.barriers
    assert RotationPlan.from_dict(report.plan.as_dict()) == report.plan


def test_who_absorbs_the_transforms_of_the_cache():
    model = double_model("llama")
    plan = rewritten(model, make("static", model, ROOM, BATCH), "decode").quarot.plan
    fates = [(one.inverse, tuple(re.sub(r"_\d+ ", " ", name) for name in one.by)) for one in plan.given[:4]]
    assert fates == [
        (False, ("add online",)),
        (True, ("add online",)),
        (False, ("model.layers.0.self_attn.v_proj.weight",)),
        (True, ("model.layers.0.self_attn.o_proj.weight",)),
    ]


def test_report_says_that_the_cache_quantised():
    model = double_model("llama")
    report = rewritten(model, make("static", model, ROOM, BATCH, k_bits=8, v_bits=3), "decode").quarot
    text = str(report)
    assert "keys, quantised by the cache" in text
    assert {(cache.kind, cache.bits) for cache in report.caches} == {("key", 8), ("value", 3)}
    assert report.coverage.quantized_keys == report.coverage.quantized_values == LAYERS
    assert "v_proj.weight (2 times)" in text


OPTIONS = {
    "4 bits": {},
    "8 bits": {"kv_bits": 8},
    "2 and 5 bits": {"k_bits": 5, "v_bits": 2},
    "groups": {"group": 8},
    "keys alone": {"v_bits": 16},
    "values alone": {"k_bits": 16},
    "16 bits": {"kv_bits": 16},
}


def kinds_and_options():
    """A cache that grows differs in its views only: what else it does with options is slow to see."""
    for name, options in OPTIONS.items():
        yield pytest.param("static", options, id=f"{name}-static")
        slow = () if name in ("4 bits", "groups") else pytest.mark.slow
        yield pytest.param("growing", options, id=f"{name}-growing", marks=slow)


@pytest.mark.parametrize(("kind", "options"), kinds_and_options())
def test_logits_are_those_of_a_graph_without_a_cache(kind, options):
    assert_logits_are_those_without_a_cache(double_model("llama", num_hidden_layers=1), kind, **options)


def test_logits_of_heads_whose_size_is_no_power_of_2():
    assert_logits_are_those_without_a_cache(double_model("llama", head_dim=12, num_hidden_layers=1), "static")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "llama"])
def test_logits_of_other_architectures(name, kind):
    assert_logits_are_those_without_a_cache(build(BY_NAME[name]), kind)


def assert_logits_are_those_without_a_cache(model, kind, sizes=(PROMPT, 1), **options):
    """In float64, where no number is near enough to a tie to be rounded differently: see test_caches.py.

    The weights that the graph without a cache has quantised are free, so that no other graph can quantise them again.
    """
    ids = random_token_ids(BATCH, sum(sizes))
    of_graph = {"kv_group" if name == "group" else name: value for name, value in options.items()}
    compiled = compile_model(model, free_originals=True, dynamic=True if kind == "growing" else None, **of_graph)
    cache = make(kind, model, ROOM, BATCH, **options)
    with torch.no_grad():
        expected = compiled(ids, use_cache=False).logits
    logits = logits_in_chunks(compiled, cache, ids, *sizes)
    assert relative_difference([logits], [expected]) < 1e-6


@pytest.mark.parametrize("kind", ["static", pytest.param("growing", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_logits_of_a_prompt_in_chunks(name, kind):
    assert_logits_are_those_without_a_cache(build(BY_NAME[name]), kind, (PROMPT, CHUNK, 1))


@pytest.mark.parametrize("kind", ["static", "growing"])
def test_logits_in_float32(kind):
    """Of the cache alone: a 4-bit code of an activation, rounded differently in float32, moves logits by more."""
    model = BY_NAME["llama"].build()
    ids = random_token_ids(BATCH, LENGTH)
    compiled = compile_model(model, w_bits=16, a_bits=16)
    with torch.no_grad():
        expected = compiled(ids, use_cache=False).logits
    logits = logits_in_chunks(compiled, make(kind, model, ROOM, BATCH), ids, PROMPT, CHUNK, 1)
    assert relative_difference([logits], [expected]) < 1e-4


def test_latent_attention():
    """A cache holds what keys and values are made of, and they themselves are never stored, and not quantised again."""
    decoder = build_tiny("deepseek_v3")
    model = decoder.model.double()
    model.set_experts_implementation("batched_mm")
    inputs = decoder.inputs | {"past_key_values": make("static", model, ROOM), "use_cache": True}
    report = quarot_fx.rewrite(model, inputs, check=True).quarot
    assert {(cache.kind, cache.bits, cache.by) for cache in report.caches} == {
        ("key", 4, "cache"),
        ("value", 4, "cache"),
    }
    assert all(one.is_identity for one in report.plan.given)
    assert max(one.difference for one in report.passes if one.name in ("place-rotations", "rotate")) < 1e-9


@pytest.mark.slow
def test_logits_of_latent_attention():
    """They are those of a plain cache of what keys and values are made of, rounded: weights are the same with both.

    A graph without a cache rounds others. There the gain of the norm before goes into the linear layer that makes keys
    and values; a cache holds what comes between.
    """
    decoder = build_tiny("deepseek_v3")
    model, ids = decoder.model.double(), decoder.inputs["input_ids"]
    model.set_experts_implementation("batched_mm")
    sizes = ids.shape[1] - 1, 1
    logits = logits_in_chunks(compile_model(model), make("static", model, ROOM), ids, *sizes)
    torch._dynamo.reset()
    expected = logits_in_chunks(compile_model(model, kv_bits=16), SimulatedCache(model), ids, ids.shape[1])
    assert relative_difference([logits], [expected]) < 1e-6


def test_an_unrotated_cache_stays_so():
    """What it holds is quantised as it is; nothing rotates the whole of it when it is read."""
    model = double_model("llama")
    module = rewritten(model, make("static", model, ROOM, BATCH, rotation="none"), "decode", check=True)
    assert set(readers(module.graph)) == {"self_attn.o_proj", "mlp.down_proj"}
    caches = {(cache.kind, cache.bits, cache.by, cache.rotated) for cache in module.quarot.caches}
    assert caches == {("key", 4, "cache", "no"), ("value", 4, "cache", "no")}
    reasons = [cache.reason for cache in module.quarot.caches if cache.kind == "value"]
    assert all("reads codes, which are held so" in reason for reason in reasons)


def test_rotation_none_leaves_the_transforms_of_the_cache():
    model = double_model("llama")
    module = rewritten(model, make("static", model, ROOM, BATCH), "decode", rotation="none", check=True)
    nodes = module.graph.find_nodes(op="call_function", target=torch.ops.quarot.rotate.default)
    assert len(nodes) == 4 * LAYERS
    assert {(cache.kind, cache.bits, cache.by) for cache in module.quarot.caches} == {
        ("key", 4, "cache"),
        ("value", 4, "cache"),
    }


def test_a_cache_of_16_bits_is_an_ordinary_one():
    model = double_model("llama")
    ours = rewritten(model, make("static", model, ROOM, BATCH, kv_bits=16), "decode").quarot
    plain = StaticCache(config=model.config, max_cache_len=ROOM)
    theirs = rewritten(model, plain, "decode").quarot
    assert ours.plan.given == ()
    found = [
        [(cache.kind, cache.bits, cache.by, cache.rotated) for cache in report.caches] for report in (ours, theirs)
    ]
    assert found[0] == found[1]
    assert {cache.by for cache in ours.caches} == {"simulation"}


@pytest.mark.slow
@pytest.mark.parametrize("nested", ["aot_eager", "inductor"])
def test_nested_backends(nested):
    model = double_model("llama")
    ids = random_token_ids(BATCH, LENGTH)
    compiled = compile_model(model, nested_backend=nested)
    with torch.no_grad():
        expected = compiled(ids, use_cache=False).logits
    logits = logits_in_chunks(compiled, make("static", model, ROOM, BATCH), ids, PROMPT, CHUNK, 1)
    assert relative_difference([logits], [expected]) < 1e-6
