"""Compiled models with a cache of few bits: one graph for a prompt, one for the tokens after it, and no more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from caches import SimulatedCache, double_model, in_double, logits_in_chunks, make
from models import random_token_ids
from tiny_decoders import build as build_tiny
from transformers import CompileConfig

from quarot_fx import QuarotCache
from quarot_fx.cache.growing import PAGE
from quarot_fx.cache.static import may_read

LENGTH, PROMPT, ROOM = 16, 5, 40
BOTH = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ONE = {"num_hidden_layers": 1}  # tracing takes long
MODELS = {"llama": ONE, "gemma3_text": BOTH}

pytestmark = pytest.mark.usefixtures("graphs")


def assert_says_the_same(logits, model, ids):
    expected = logits_in_chunks(model, SimulatedCache(model), ids, ids.shape[1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "backend"), [("llama", "aot_eager"), ("gemma3_text", "eager")])
def test_static_cache(name, backend, graphs):
    """The window is being filled, becomes full and moves on in one graph."""
    model, ids = double_model(name, **MODELS[name]), random_token_ids(2, LENGTH)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache = make("static", model, ROOM, batch_size=2)
    for _ in range(2):
        assert_says_the_same(logits_in_chunks(compiled, cache, ids, PROMPT, *(1,) * (LENGTH - PROMPT)), model, ids)
        assert graphs() == 2
        cache.reset()


def test_prompts_of_other_lengths_share_a_graph(graphs):
    model = double_model("llama", **ONE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = make("static", model, ROOM)
    for prompt in (5, 7, 11, 30):
        ids = random_token_ids(1, prompt + 2, seed=prompt)
        assert_says_the_same(logits_in_chunks(compiled, cache, ids, prompt, 1, 1), model, ids)
        cache.reset()
    assert graphs() == 3  # the prompt's is compiled once more, for any length


def test_a_prompt_attends_to_itself_alone(graphs):
    """No mask of the room that there is, and nothing decoded from it: attention over fresh keys alone."""
    model, shapes = double_model("llama", **ONE), []

    def record(graph, inputs):
        attention = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        shapes.extend(read.meta["example_value"].shape for node in attention for read in node.all_input_nodes)
        return graph

    cache = make("static", model, ROOM)
    with torch.no_grad():
        torch.compile(model, backend=record, fullgraph=True)(random_token_ids(1, PROMPT), past_key_values=cache)
    assert all(PROMPT in shape and ROOM not in shape for shape in shapes)
    assert len(shapes) >= 3 * model.config.num_hidden_layers


def test_growing_cache(graphs):
    model, ids = double_model("llama", **ONE), random_token_ids(1, PAGE + 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    sizes = PAGE - 3, *(1,) * 6
    logits = logits_in_chunks(compiled, make("growing", model, ROOM), ids[:, : PAGE + 3], *sizes)
    assert_says_the_same(logits, model, ids)
    assert graphs() <= 4  # the prompt, a token, one that makes room, and one for any room


@pytest.mark.parametrize(("name", "kind"), [("mpt", "growing"), ("biogpt", "static")])
def test_models_that_take_the_number_of_tokens_for_a_size(name, kind, graphs):
    """A tensor, as a static cache has it, is none: then the mask has to be given, as `generate` gives it."""
    decoder = build_tiny(name)
    model, ids = in_double(decoder.model), decoder.inputs["input_ids"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache, logits = make(kind, model, ROOM), []
    with torch.no_grad():
        for chunk in ids.split([PROMPT, 1, 1, ids.shape[1] - PROMPT - 2], dim=1):
            mask = torch.ones(1, int(cache.get_seq_length()) + chunk.shape[1], dtype=torch.int64)
            logits.append(compiled(chunk, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        expected = model(ids, past_key_values=SimulatedCache(model), use_cache=True).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_generate_compiles(name, graphs):
    model, ids = double_model(name, **MODELS[name]), random_token_ids(1, PROMPT)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # as it is on GPUs
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=SimulatedCache(model), **options).tolist()
    cache = make("static", model, ROOM)
    for _ in range(2):
        out = model.generate(ids, past_key_values=cache, compile_config=config, **options)
        assert out.tolist() == expected
        assert graphs() == 1  # transformers runs prompts as they are
        cache.reset()


def test_generate_compiles_chunks_of_a_prompt():
    model, ids = double_model("llama", **ONE), random_token_ids(1, PROMPT)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=SimulatedCache(model), **options).tolist()
    cache = make("static", model, ROOM)
    out = model.generate(ids, past_key_values=cache, compile_config=config, prefill_chunk_size=2, **options)
    assert out.tolist() == expected


def test_tensors_made_by_the_first_call():
    """A cache that was not made early works, too; only its addresses are not fixed."""
    model, ids = double_model("gemma3_text", **BOTH), random_token_ids(1, LENGTH)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = QuarotCache(model.config, ROOM)
    assert_says_the_same(logits_in_chunks(compiled, cache, ids, PROMPT, *(1,) * (LENGTH - PROMPT)), model, ids)


def test_a_traced_graph_asks_nothing_of_the_stream(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(True) or False)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert may_read(on_gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not may_read(on_gpu)
    assert asked == [True]
