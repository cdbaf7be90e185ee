"""``generate`` with a cache of few bits, in every way that it decodes: what it says is what a simulated cache says."""

from __future__ import annotations

import copy

import pytest
import torch
from caches import SimulatedCache, double_model, make
from models import random_token_ids, tiny_model

import quarot_fx
from quarot_fx.errors import CacheFullError, CacheInputError, CropError

KINDS = ("static", "growing")
PROMPT, NEW, ROOM = 7, 12, 32
BOTH = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
# Full attention, windows, both, norms of queries and keys, learnt positions, experts.
MODELS = {"llama": {}, "mistral": {"sliding_window": 6}, "gemma3_text": BOTH, "qwen3": {}, "gpt2": {}, "mixtral": {}}


def generate(model, ids, cache, **options):
    """Generate tokens; a sequence does not stop before NEW of them."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    torch.manual_seed(0)
    return model.generate(ids, past_key_values=cache, **options)


def assert_says_the_same(model, kind, sequences=1, batch=1, **options):
    """Compare tokens, and the logits that they were chosen by: tiny models like to repeat themselves."""
    ids = random_token_ids(batch, PROMPT)
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = generate(model, ids, SimulatedCache(model), **options)
    cache = make(kind, model, ROOM, batch_size=batch * sequences)
    out = generate(model, ids, cache, **options)
    assert out.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-6)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy(name, kind):
    assert_says_the_same(double_model(name, **MODELS[name]), kind, batch=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_in_float32(name, kind):
    """Token for token; logits may differ where a number lies at the border of its code."""
    model, ids = tiny_model(name, **MODELS[name]), random_token_ids(2, PROMPT)
    expected = generate(model, ids, SimulatedCache(model)).tolist()
    assert generate(model, ids, make(kind, model, ROOM, batch_size=2)).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_sampling(kind):
    assert_says_the_same(double_model("llama"), kind, sequences=2, do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams(name, kind):
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert_says_the_same(double_model(name, **MODELS[name]), kind, sequences=3, batch=2, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_prefill(kind):
    model = double_model("gemma3_text", **BOTH)
    cache = assert_says_the_same(model, kind, prefill_chunk_size=3)
    assert cache.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize("kind", KINDS)
def test_streaming(kind):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, ids, streamer = double_model("llama"), random_token_ids(1, PROMPT), Streamer()
    out = generate(model, ids, make(kind, model, ROOM), streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_left_padding_changes_nothing(name, kind):
    model = double_model(name, **MODELS[name])
    short, long = random_token_ids(1, 3, seed=1), random_token_ids(1, PROMPT, seed=2)
    options = {"return_dict_in_generate": True, "output_logits": True}
    alone = [generate(model, ids, make(kind, model, ROOM), **options) for ids in (short, long)]
    padded = torch.cat((torch.cat((torch.zeros(1, PROMPT - 3, dtype=torch.int64), short), dim=1), long))
    mask = (padded != 0).long()
    together = generate(model, padded, make(kind, model, ROOM, batch_size=2), attention_mask=mask, **options)
    expected = [torch.cat(logits) for logits in zip(*(out.logits for out in alone), strict=True)]
    torch.testing.assert_close(list(together.logits), expected, rtol=0, atol=1e-6)


# -- assisted decoding -----------------------------------------------------------------------------


ASSISTANTS = {
    "another model": lambda: {"assistant_model": double_model("llama", seed=1)},
    "the model itself": lambda: {"assistant_model": double_model("llama")},
    "the prompt": lambda: {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_assisted_decoding(assistant, kind):
    model = double_model("llama")
    ids = random_token_ids(1, 4).repeat(1, 3)  # for the prompt to say something about what follows
    expected = generate(model, ids, SimulatedCache(model))
    cache = make(kind, model, ROOM)
    assert generate(model, ids, cache, **ASSISTANTS[assistant]()).tolist() == expected.tolist()
    assert cache.get_seq_length() == expected.shape[1] - 1


def test_assisted_decoding_with_windows():
    model = double_model("gemma3_text", **BOTH)
    ids = random_token_ids(1, 4).repeat(1, 3)
    expected = generate(model, ids, SimulatedCache(model))
    cache = make("growing", model, ROOM)
    assert generate(model, ids, cache, prompt_lookup_num_tokens=3).tolist() == expected.tolist()
    with pytest.raises(CropError, match=r"layer 0: new tokens take the place of old ones. .*without max_cache_len"):
        generate(model, ids, make("static", model, ROOM), prompt_lookup_num_tokens=3)


# -- a cache that has something in it --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_going_on(name, kind):
    """A second turn: everything again, or the new tokens alone; both as if all had come at once."""
    model = double_model(name, **MODELS[name])
    ids = random_token_ids(1, PROMPT)
    cache = make(kind, model, ROOM)
    first = generate(model, ids, cache, max_new_tokens=4)
    turn = torch.cat((first, random_token_ids(1, 3, seed=5)), dim=1)
    expected = generate(model, turn, SimulatedCache(model), max_new_tokens=4)
    assert generate(model, turn, cache, max_new_tokens=4).tolist() == expected.tolist()
    cache.reset()
    assert generate(model, ids, cache, max_new_tokens=4).tolist() == first.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_one_prefix_for_several_requests(kind):
    """A cache with a system prompt in it is copied, or what a request added is taken back."""
    model = double_model("llama")
    prefix = random_token_ids(1, PROMPT)
    cache = make(kind, model, ROOM)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for seed in (1, 2):
        request = torch.cat((prefix, random_token_ids(1, 3, seed=seed)), dim=1)
        expected = generate(model, request, SimulatedCache(model)).tolist()
        assert generate(model, request, copy.deepcopy(cache)).tolist() == expected
        assert generate(model, request, cache).tolist() == expected
        cache.crop(int(PROMPT - cache.get_seq_length()))


@pytest.mark.parametrize("kind", KINDS)
def test_several_answers_from_one_prompt(kind):
    model = double_model("llama")
    ids = random_token_ids(1, PROMPT)
    cache = make(kind, model, ROOM)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    answers = generate(model, ids.repeat(3, 1), cache)
    assert answers.tolist() == generate(model, ids, SimulatedCache(model)).repeat(3, 1).tolist()
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1


# -- mistakes --------------------------------------------------------------------------------------


def test_a_cache_that_gets_full():
    model = double_model("llama")
    with pytest.raises(CacheFullError, match=r"layer 0 holds 10 of at most 10 tokens, and 1 more came"):
        generate(model, random_token_ids(1, PROMPT), make("static", model, 10))


def test_a_window_has_no_end():
    model = double_model("mistral", sliding_window=6)
    ids = random_token_ids(1, PROMPT)
    expected = generate(model, ids, SimulatedCache(model)).tolist()
    assert generate(model, ids, make("static", model, 10)).tolist() == expected


def test_more_beams_than_sequences():
    model = double_model("llama")
    with pytest.raises(CacheInputError, match=r"\[3, 2, tokens, 16\].*made for torch.float64 \[1, .*beams"):
        generate(model, random_token_ids(1, PROMPT), make("static", model, ROOM), num_beams=3)


def test_generate_uses_no_other_cache():
    model = double_model("llama")
    cache = quarot_fx.generation_cache(model)
    out = generate(model, random_token_ids(1, PROMPT), cache, return_dict_in_generate=True)
    assert out.past_key_values is cache
