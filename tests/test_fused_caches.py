"""Models with a cache of few bits whose appends and reads are fused: their graphs, reports and logits."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType

import pytest
import torch
from architectures import LAYERS, compile_model
from caches import double_model, logits_in_chunks, make
from models import random_token_ids
from test_cached_graphs import BATCH, BY_NAME, CHUNK, LENGTH, PROMPT, ROOM, build, rewritten

import quarot_fx
from quarot_fx.float64 import relative_difference

OPS = ("append_pair", "append_dequantize", "attend_packed", "unpack", "pack", "dequantize", "index_copy", "rope_rotate",
       "balance")  # fmt: skip

pytestmark = pytest.mark.usefixtures("graphs")


def fused(model, kind, stage, of_cache=MappingProxyType({}), **options):
    """Return how often a rewritten graph calls the operators that matter, and its report."""
    module = rewritten(model, make(kind, model, ROOM, BATCH, **of_cache), stage, kernels="reference", **options)
    targets = (node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    names = Counter(target._schema.name.partition("::")[2] for target in targets)
    return {name: names[name] for name in OPS if names[name]}, module.quarot


def reasons(report, name):
    (one,) = (one for one in report.passes if one.name == name)
    return one.matched, sorted({declined.reason for declined in one.declined})


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("prompt", {"append_dequantize": 2 * LAYERS, "rope_rotate": LAYERS}),  # those of queries stay
        ("chunk", {"append_pair": LAYERS, "attend_packed": LAYERS, "rope_rotate": LAYERS}),
        ("decode", {"append_pair": LAYERS, "attend_packed": LAYERS, "rope_rotate": LAYERS}),
    ],
)
def test_a_layer_has_one_op_that_stores_and_one_that_attends(stage, expected):
    names, report = fused(double_model("llama"), "static", stage, check=True)
    assert names == expected
    assert reasons(report, "fuse-appends") == (2 * LAYERS, [])
    assert {(one.kind, one.bits, one.by) for one in report.caches} == {("key", 4, "cache"), ("value", 4, "cache")}
    assert max(one.difference for one in report.passes if "append" in one.name or "packed" in one.name) < 1e-9


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("prompt", {"append_dequantize": 2 * LAYERS, "rope_rotate": LAYERS}),
        ("decode", {"append_pair": LAYERS, "attend_packed": LAYERS, "rope_rotate": LAYERS}),
    ],
)
def test_balanced_keys_have_the_same_ops(stage, expected):
    model = double_model("llama")
    found = quarot_fx.calibrate(model, random_token_ids(2, 14), w_rounding="nearest", key_balance="search")
    names, report = fused(model, "static", stage, {"key_balance": found.options["key_balance"]}, check=True)
    assert names == expected
    assert max(one.difference for one in report.passes if "append" in one.name) < 1e-9


@pytest.mark.parametrize("stage", ["prompt", "decode"])
def test_layers_with_windows_have_the_same_ops(stage):
    """A token goes to its place in the window; of a prompt that is longer, the end does."""
    names, report = fused(build(BY_NAME["gemma3_text"]), "static", stage)
    assert reasons(report, "fuse-appends") == (2 * LAYERS, [])
    if stage == "prompt":
        assert names["append_dequantize"] == 2 * LAYERS
    else:
        assert (names["append_pair"], names["attend_packed"]) == (LAYERS, LAYERS)


@pytest.mark.parametrize("kind", ["static", pytest.param("growing", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_logits_stay_as_they_are(name, kind):
    model, ids = build(BY_NAME[name]), random_token_ids(BATCH, LENGTH)
    logits = []
    for kernels in ("reference", "none"):
        compiled = compile_model(model, kernels=kernels, w_bits=16, a_bits=16)
        logits.append(logits_in_chunks(compiled, make(kind, model, ROOM, BATCH), ids, PROMPT, CHUNK, 1))
    assert relative_difference(*([one] for one in logits)) < 1e-6
