"""``generate`` of models that the backend compiles, with a cache of few bits: tokens are those of a graph without a
cache, and nothing is compiled again once all graphs have been.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from caches import SimulatedCache, double_model, logits_in_chunks, make
from models import random_token_ids
from transformers import CompileConfig

PROMPT, NEW, ROOM = 7, 6, 24
ONE = {"num_hidden_layers": 1}  # tracing takes long
BOTH = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {"llama": ONE, "gemma3_text": BOTH}

pytestmark = pytest.mark.usefixtures("graphs")


def by_model_compile(model, **options):
    model.compile(backend="quarot", options=options)


def by_forward(model, **options):
    model.forward = torch.compile(model.forward, backend="quarot", options=options)


COMPILE = {"model.compile": by_model_compile, "model.forward": by_forward}


def compiled(name, how=by_model_compile, nested="eager", **options):
    """A tiny model in float64, where the order of a sum never moves a number over the border of its code."""
    model = double_model(name, **MODELS[name])
    how(model, nested_backend=nested, **options)
    return model


def generate(model, ids, **options):
    """Return the tokens, and the logits by which each was chosen: tiny models like to repeat themselves."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    torch.manual_seed(0)
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def assert_same(out, expected):
    assert out.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-6)


def assert_generates_as_without_a_cache(graphs, name, kind="static", sequences=1, batch=1, ids=None, **options):
    """Compare with a model that runs the whole sequence for every token; twice, the second time without compiling."""
    how, nested = options.pop("how", by_model_compile), options.pop("nested", "eager")
    ids = random_token_ids(batch, PROMPT) if ids is None else ids
    expected = generate(compiled(name), ids, use_cache=False, **options)
    model = compiled(name, how, nested)
    cache = make(kind, model, ROOM, batch_size=len(ids) * sequences)
    assert_same(generate(model, ids, past_key_values=cache, **options), expected)
    count = graphs()
    cache.reset()
    assert_same(generate(model, ids, past_key_values=cache, **options), expected)
    assert graphs() == count


@pytest.mark.parametrize("how", COMPILE.values(), ids=COMPILE)
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_greedy(name, how, graphs):
    assert_generates_as_without_a_cache(graphs, name, how=how)


def test_growing_cache(graphs):
    assert_generates_as_without_a_cache(graphs, "llama", kind="growing")


@pytest.mark.parametrize("nested", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_nested_backends(nested, graphs):
    assert_generates_as_without_a_cache(graphs, "llama", nested=nested)


def test_sampling(graphs):
    assert_generates_as_without_a_cache(graphs, "llama", sequences=2, do_sample=True, num_return_sequences=2)


def test_beams(graphs):
    assert_generates_as_without_a_cache(graphs, "llama", sequences=3, num_beams=3, num_return_sequences=2)


def test_left_padded_batch(graphs):
    ids = random_token_ids(2, PROMPT)
    ids[0, :3] = 0
    assert_generates_as_without_a_cache(graphs, "llama", ids=ids, attention_mask=(ids != 0).long())


def test_assisted_by_the_prompt(graphs):
    """Candidates are checked several at once, and those that are wrong are taken back from the cache."""
    ids = random_token_ids(1, 4).repeat(1, 3)
    expected = generate(compiled("llama"), ids, use_cache=False).sequences
    model = compiled("llama")
    cache = make("static", model, ROOM)
    counts = []
    for _ in range(2):
        out = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=3)
        assert out.sequences.tolist() == expected.tolist()
        counts.append(graphs())
        cache.reset()
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 0], ids=["of other weights", "its twin"])
def test_assisted_by_a_compiled_model(seed, graphs):
    """A draft model with a cache of its own, compiled too: what it proposes changes no token."""
    ids = random_token_ids(1, PROMPT)
    expected = generate(compiled("llama"), ids, use_cache=False).sequences
    model, draft = compiled("llama"), double_model("llama", **ONE, seed=seed)
    by_model_compile(draft, nested_backend="eager")
    caches = [make("static", one, ROOM) for one in (model, draft)]
    draft.generate = partial(draft.generate, past_key_values=caches[1])
    counts = []
    for _ in range(2):
        out = generate(model, ids, past_key_values=caches[0], assistant_model=draft)
        assert out.sequences.tolist() == expected.tolist()
        assert all(cache.get_seq_length() >= PROMPT for cache in caches)
        assert [cache.report().uncompiled_tokens for cache in caches] == [0, 0]
        counts.append(graphs())
        for cache in caches:
            cache.reset()
    assert counts[0] == counts[1]


def test_streaming():
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, ids, streamer = compiled("llama"), random_token_ids(1, PROMPT), Streamer()
    out = generate(model, ids, past_key_values=make("static", model, ROOM), streamer=streamer)
    assert streamer.tokens == [*out.sequences[0].tolist(), "end"]


def test_one_prefix_for_several_requests(graphs):
    """What the packed cache holds of a prefix is read by every request, and what a request adds is taken back."""
    prefix = random_token_ids(1, PROMPT)
    requests = [torch.cat((prefix, random_token_ids(1, 3, seed=seed)), dim=1) for seed in (1, 2)]
    expected = [generate(compiled("llama"), ids, use_cache=False) for ids in requests]
    model, counts = compiled("llama"), []
    cache = make("static", model, ROOM)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for ids, out in zip(requests, expected, strict=True):
        assert_same(generate(model, ids, past_key_values=cache), out)
        cache.crop(int(PROMPT - cache.get_seq_length()))
        counts.append(graphs())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("first", ["compiled", "uncompiled"])
def test_a_cache_that_one_writes_and_the_other_reads(first):
    """A model as it is and a compiled one hold keys and values in one basis; only the cache is in few bits here."""
    model, ids = double_model("llama", **ONE), random_token_ids(1, PROMPT + 2)
    fast = torch.compile(model, backend="quarot", options={"nested_backend": "eager", "w_bits": 16, "a_bits": 16})
    writer, reader = (fast, model) if first == "compiled" else (model, fast)
    cache = make("static", model, ROOM)
    logits = [logits_in_chunks(writer, cache, ids[:, :PROMPT], PROMPT)]
    logits.append(logits_in_chunks(reader, cache, ids[:, PROMPT:], 1, 1))
    expected = logits_in_chunks(model, SimulatedCache(model), ids, PROMPT + 2)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-6)


# -- generate that compiles by itself --------------------------------------------------------------


def compile_config(**options):
    config = CompileConfig(backend="quarot", mode=None, options={"nested_backend": "eager", **options})
    config._compile_all_devices = True  # as it is on GPUs
    return config


@pytest.mark.parametrize("name", MODELS)
def test_compile_config(name, graphs):
    """Prompts are run as the model is, uncompiled, and all tokens after it compiled; rotation alone changes neither."""
    model, ids = double_model(name, **MODELS[name]), random_token_ids(1, PROMPT)
    expected = generate(model, ids, past_key_values=SimulatedCache(model))
    cache = make("static", model, ROOM)
    for _ in range(2):
        config = compile_config(w_bits=16, a_bits=16)
        assert_same(generate(model, ids, past_key_values=cache, compile_config=config), expected)
        assert graphs() == 1
        assert cache.report().uncompiled_tokens == PROMPT
        cache.reset()


def test_compile_config_in_four_bits(graphs):
    """What follows an uncompiled prompt is what a compiled model makes of the same cache."""
    model, ids = double_model("llama", **ONE), random_token_ids(1, PROMPT)
    cache = make("static", model, ROOM)
    out = generate(model, ids, past_key_values=cache, compile_config=compile_config())
    assert graphs() == 1
    cache.reset()
    step = torch.compile(model, backend="quarot", options={"nested_backend": "eager"})
    calls = [(model, ids), *((step, token[:, None]) for token in out.sequences[:, PROMPT:-1].T)]
    with torch.no_grad():
        expected = [call(tokens, past_key_values=cache).logits[:, -1].float() for call, tokens in calls]
    torch.testing.assert_close(list(out.logits), expected, rtol=0, atol=1e-6)


def test_compile_config_with_the_prompt_in_chunks(graphs):
    """Chunks of a prompt are run compiled, a single one, too: then all tokens are in few bits."""
    ids = random_token_ids(1, PROMPT)
    expected = generate(compiled("llama"), ids, use_cache=False)
    model = double_model("llama", **ONE)
    cache = make("static", model, ROOM)
    before = graphs()
    for _ in range(2):
        options = {"compile_config": compile_config(), "prefill_chunk_size": PROMPT}
        assert_same(generate(model, ids, past_key_values=cache, **options), expected)
        assert graphs() == before + 2
        assert cache.report().uncompiled_tokens == 0
        cache.reset()
