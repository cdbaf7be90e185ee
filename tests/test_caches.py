"""Prefill and decode with a KV cache: what the compiled model says, and what it leaves in the cache."""

from __future__ import annotations

from statistics import median_high

import pytest
import torch
from architectures import ARCHITECTURES, compile_model
from models import random_token_ids
from transformers import DynamicCache, StaticCache

from quarot_fx.float64 import relative_difference

BATCH, PROMPT, LENGTH = 2, 12, 14  # longer than the window of those that have one
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}
BY_NAME = {row.model_type: row for row in ARCHITECTURES}

pytestmark = pytest.mark.usefixtures("graphs")


def generate(model, cache, ids, prompt=PROMPT):
    """Return the logits of the prompt at once and of every token after it, and keys and values in the end."""
    with torch.no_grad():
        positions = torch.arange(ids.shape[1]).expand_as(ids)  # OPT would compute them from a mask, data-dependently
        sizes = [prompt] + [1] * (ids.shape[1] - prompt)
        chunks = zip(ids.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True)
        logits = [model(chunk, position_ids=at, past_key_values=cache).logits for chunk, at in chunks]
    return torch.cat(logits, dim=1), [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_decodes_as_eager(row, kind, length=LENGTH, **options):
    model = row.build()
    ids = random_token_ids(BATCH, length)
    expected, expected_cache = generate(model, CACHES[kind](model.config), ids)
    logits, cache = generate(compile_model(model, stop_after="rotate", **options), CACHES[kind](model.config), ids)
    assert relative_difference([logits], [expected]) < 1e-4
    assert relative_difference(cache, expected_cache) < 1e-4  # a cache is the user's: canonical, as eager leaves it


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.model_type)
def test_static_cache(row, graphs):
    assert_decodes_as_eager(row, "static")
    assert graphs() == 2  # prefill and decode


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.model_type)
def test_dynamic_cache(row, graphs):
    assert_decodes_as_eager(row, "dynamic", length=PROMPT + 1)
    assert graphs() == 2


def test_dynamic_cache_grows_without_recompiling(graphs):
    assert_decodes_as_eager(BY_NAME["llama"], "dynamic", length=PROMPT + 6)
    assert graphs() == 3  # prefill, the first decode step, and one for every length after it


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("nested", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_nested_backends(kind, nested):
    assert_decodes_as_eager(BY_NAME["llama"], kind, nested_backend=nested)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "dynamic"),
        ("llama", "static"),
        ("gpt2", "static"),
        ("mixtral", "static"),
        ("gemma2", "static"),
    ],
)
def test_four_bits_decode_token_by_token_as_at_once(name, kind):
    """Weights, tokens, and keys and values of a token are rounded the same, however many tokens come at a time.

    In float64 the order of a sum changes it by 1e-16, and where a model casts to float32 a few values by 1e-7. So
    nothing is near enough to a tie to be rounded differently; a 4-bit code that differed would show far above 1e-6.
    One of Mixtral's sequences is, on some processors, and only of its four one may be.
    """
    model = BY_NAME[name].build().double()
    ids = random_token_ids(2 * BATCH, LENGTH)
    compiled = compile_model(model, dynamic=True if kind == "dynamic" else None)
    at_once, _ = generate(compiled, CACHES[kind](model.config), ids, prompt=LENGTH)
    by_token, _ = generate(compiled, CACHES[kind](model.config), ids, prompt=1)
    differences = [relative_difference([one], [other]) for one, other in zip(by_token, at_once, strict=True)]
    assert (median_high if name == "mixtral" else max)(differences) < 1e-6


@pytest.mark.parametrize("kv_bits", [4, 16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_four_bits_are_the_same_with_a_cache_and_without(name, kv_bits):
    """A cache pins what enters it, and yet the weights that write keys and values are rounded in the same basis: both
    graphs share them, and the originals are free.
    """
    model = BY_NAME[name].build().double()
    ids = random_token_ids(BATCH, LENGTH)
    compiled = compile_model(model, kv_bits=kv_bits, free_originals=True)
    with torch.no_grad():
        without_cache = compiled(ids, use_cache=False).logits
    with_cache, _ = generate(compiled, CACHES["static"](model.config), ids)
    assert relative_difference([with_cache], [without_cache]) < 1e-6
