"""Prefill and decode with a KV cache: what the compiled model says, and what it leaves in the cache."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
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


def compile_model(model, *, dynamic=None, **options):
    options = {"nested_backend": "eager", **options}
    return torch.compile(model, backend="quarot", fullgraph=True, dynamic=dynamic, options=options)


def generate(model, cache, ids, prompt=PROMPT):
    """Return the logits of the prompt at once and of every token after it, and keys and values in the end."""
    with torch.no_grad():
        chunks = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
        logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_decodes_as_eager(row, kind, **options):
    model = row.build()
    ids = random_token_ids(BATCH, LENGTH)
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
    assert_decodes_as_eager(row, "dynamic")
    assert graphs() == 3  # prefill, the first decode step, and one for every length after it
