"""Logits with a cache of few bits: those of a simulated one, and the same however tokens come."""

from __future__ import annotations

import pytest
import tiny_decoders
import torch
from caches import SimulatedCache, double_model, in_double, logits_in_chunks, make
from models import random_token_ids, tiny_model
from trained import babyllama

import quarot_fx

KINDS = ("static", "growing")
LENGTH, ROOM = 16, 20
BOTH = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKS = {
    "at once": (16,),
    "in chunks": (5, 3, 1, 7),
    "one by one": (1,) * 16,
    "a prompt, then one by one": (9,) + (1,) * 7,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("name", "config"), [("llama", {}), ("gemma3_text", BOTH)], ids=["llama", "gemma3_text"])
def test_tokens_come_in_any_number_at_a_time(name, config, chunks, kind):
    model = double_model(name, **config)
    ids = random_token_ids(2, LENGTH)
    expected = logits_in_chunks(model, SimulatedCache(model), ids, LENGTH)
    logits = logits_in_chunks(model, make(kind, model, ROOM, batch_size=2), ids, *CHUNKS[chunks])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"k_bits": 2, "v_bits": 3},
        {"k_bits": 8, "v_bits": 4, "group": 8},
        {"k_bits": 16, "v_bits": 4},
        {"kv_bits": 16},
    ],
    ids=str,
)
def test_options(options, kind):
    model = double_model("llama")
    ids = random_token_ids(1, LENGTH)
    bits = [options.get("kv_bits") or options[name] for name in ("k_bits", "v_bits")]
    expected = logits_in_chunks(model, SimulatedCache(model, *bits, group=options.get("group")), ids, LENGTH)
    logits = logits_in_chunks(model, make(kind, model, ROOM, **options), ids, 9, *(1,) * 7)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [12, 20, 22, 80])
def test_heads_of_any_size(size, kind):
    """Of 22 elements there is no Hadamard matrix of whole heads."""
    model = double_model("llama", head_dim=size)
    ids = random_token_ids(1, LENGTH)
    expected = logits_in_chunks(model, SimulatedCache(model), ids, LENGTH)
    logits = logits_in_chunks(model, make(kind, model, ROOM), ids, 9, *(1,) * 7)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_few_bits_differ_from_16_and_rotation_matters():
    """What the other tests compare is not all the same."""
    model = double_model("llama")
    ids = random_token_ids(1, LENGTH)
    every = [{"kv_bits": 16}, {"kv_bits": 4}, {"kv_bits": 4, "rotation": "none"}, {"kv_bits": 4, "clip": 0.8}]
    logits = [logits_in_chunks(model, make("static", model, ROOM, **options), ids, LENGTH) for options in every]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(logits) for b in logits[:i])
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_taken_back_leave_no_trace(kind):
    model = double_model("llama")
    ids, wrong = random_token_ids(1, LENGTH), random_token_ids(1, 4, seed=9)
    cache = make(kind, model, ROOM)
    first = logits_in_chunks(model, cache, ids[:, :9], 9)
    logits_in_chunks(model, cache, wrong, 3, 1)
    cache.crop(-4)
    rest = logits_in_chunks(model, cache, ids[:, 9:], 4, 3)
    expected = logits_in_chunks(model, SimulatedCache(model), ids, LENGTH)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 2, 6, 40])
def test_windows_equal_a_mask(window, kind):
    """A cache that stores a window alone says what one says that stores all and hides what is outside of it."""
    model = double_model("mistral", sliding_window=window)
    ids = random_token_ids(1, LENGTH)
    position = torch.arange(LENGTH)
    visible = (position[:, None] >= position) & (position[:, None] - position < window)
    everything = SimulatedCache(double_model("mistral", sliding_window=None))
    with torch.no_grad():
        expected = model(ids, attention_mask=visible[None, None], past_key_values=everything).logits
    logits = logits_in_chunks(model, make(kind, model, ROOM), ids, 4, 1, 1, 3, *(1,) * 7)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, kind):
    """Attention gets what it would get of a plain cache, in the model's dtype."""
    model = tiny_model("llama").to(dtype)
    cache, simulated = make(kind, model, ROOM), SimulatedCache(model)
    for each in (cache, simulated):
        logits_in_chunks(model, each, random_token_ids(1, LENGTH), LENGTH)
    for layer, expected in zip(cache.layers, simulated.layers, strict=True):
        assert layer.keys.dtype == layer.values.dtype == dtype
        torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=0)
        torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=0)


# Latent keys and values of unlike sizes, a state beside attention, a layer for several, chunks, learnt positions.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["deepseek_v3", "jamba", "qwen3_next", "gemma3n_text", "llama4_text", "gpt_bigcode"])
def test_other_architectures(name, kind):
    decoder = tiny_decoders.build(name)
    model, ids = in_double(decoder.model), decoder.inputs["input_ids"][:1]
    expected = logits_in_chunks(model, SimulatedCache(model), ids, 9, *(1,) * 7)
    logits = logits_in_chunks(model, make(kind, model, ROOM), ids, 9, *(1,) * 7)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_model(kind):
    """Real weights: 4 bits say what a simulated cache says, token by token, and 8 bits what the model says."""
    model = babyllama()
    ids = torch.arange(12)[None] * 7 % model.config.vocab_size
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = [
        model.generate(ids, past_key_values=cache, **options).tolist()
        for cache in (
            SimulatedCache(model),
            make(kind, model, 64),
            make(kind, model, 64, kv_bits=8),
            make(kind, model, 64, kv_bits=16),
        )
    ]
    assert said[0] == said[1]
    assert said[2] == said[3] == model.generate(ids, **options).tolist()


def test_public_names_are_those_of_the_package():
    assert quarot_fx.generation_cache.__module__ == "quarot_fx.cache.generation"
    assert quarot_fx.QuarotCache.__module__ == "quarot_fx.cache.quarot_cache"
