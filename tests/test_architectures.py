"""Every architecture of the table: the plan, rotation that changes nothing, 4 bits, dynamic shapes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, ONE_OF_A_KIND, compile_model
from models import random_token_ids
from plans import readers_of_online_transforms

import quarot_fx
from quarot_fx.capture import INPUT
from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.inspection import capture_one_graph
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.store import SHARED

ROTATED = {"stop_after": "rotate"}
UNQUANTIZED = {"w_bits": 16, "a_bits": 16, "kv_bits": 16}

pytestmark = pytest.mark.usefixtures("graphs")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda row: row.model_type)
def row(request):
    return request.param


@pytest.fixture(scope="module")
def inputs():
    return {"input_ids": random_token_ids(batch=2), "use_cache": False}


@pytest.fixture(scope="module")
def program(row, inputs):
    """The captured model in float64, so that constants made from its weights are not rounded, and what it is run on."""
    captured, arguments = capture_one_graph(row.build().double(), inputs)
    program = captured.bind(arguments, SHARED)
    return program, [arguments[node.meta[INPUT]] for node in program.graph.find_nodes(op="placeholder")]


def test_plan_is_what_one_would_do_by_hand(row, program):
    rotated = run_pipeline(program[0], build_pipeline(QuarotConfig(**ROTATED)))
    report = cover(rotated)
    readers = readers_of_online_transforms(rotated.graph)
    assert Counter(readers) == Counter([" ".join(sorted(group.split())) for group in row.online] * LAYERS)
    assert len(report.plan.online) == len(readers)
    linears = Counter(rotated for _, rotated in {(linear.parameter, linear.rotated) for linear in report.linears})
    online = " ".join(row.online).split()
    expected = {
        "free": row.free,
        "online": LAYERS * len([name for name in online if name not in ("query", "key")]),
        "no": row.not_rotated,
    }
    assert linears == Counter(expected)
    caches = Counter((cache.kind, cache.rotated) for cache in report.caches)
    assert caches == {("key", row.keys): LAYERS, ("value", row.values): LAYERS}
    assert {one.name: len(one.declined) for one in report.passes if one.declined} == row.declined
    assert tuple(target for target, _ in report.plan.barriers) == row.barriers


@pytest.mark.parametrize("options", [ROTATED, UNQUANTIZED], ids=["stop_after", "16_bits"])
def test_rotation_is_exact_in_float64(program, options):
    captured, inputs = program
    rotated = run_pipeline(captured, build_pipeline(QuarotConfig(**options)))
    assert rotated.plan.online
    expected = run_in_float64(captured.graph_module, *inputs)
    assert relative_difference(run_in_float64(rotated.graph_module, *inputs), expected) < 1e-9


def test_rotation_alone_changes_nothing(row, inputs):
    model = row.build().double()
    with torch.no_grad():
        logits = compile_model(model, **UNQUANTIZED)(**inputs).logits
        model.set_experts_implementation("batched_mm")  # eager torch has no grouped product in float64
        expected = model(**inputs).logits
    assert logits.dtype == torch.float64
    assert relative_difference([logits], [expected]) < 1e-5


@pytest.mark.parametrize("row", ONE_OF_A_KIND)
def test_four_bits(row, inputs):
    model = row.build()
    rewritten = quarot_fx.rewrite(model, inputs)
    with torch.no_grad():
        logits, expected = compile_model(model)(**inputs).logits, model(**inputs).logits
    assert logits.isfinite().all()
    assert torch.equal(logits, rewritten(inputs["input_ids"])[0])
    assert relative_difference([logits], [expected]) > 1e-3
    report = rewritten.quarot
    bits = {linear.parameter: (linear.w_bits, linear.a_bits) for linear in report.linears}
    assert {name for name, both in bits.items() if both != (4, 4)} == set(row.unquantized)
    assert {bits[name] for name in row.unquantized} == {(16, 16)}
    assert [cache.bits for cache in report.caches] == [4] * 2 * LAYERS


@pytest.mark.parametrize("row", ONE_OF_A_KIND)
def test_one_graph_serves_all_shapes(row, graphs):
    """Sizes that are those of weights, too, by chance (16, 2 * 16, 4 * 16), must not be taken for them."""
    model = row.build()
    compiled = compile_model(model, dynamic=True, **ROTATED)
    with torch.no_grad():
        for batch, length in (2, 16), (3, 23), (4, 16):
            ids = random_token_ids(batch, length)
            logits, expected = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            assert relative_difference([logits], [expected]) < 1e-4
    assert graphs() == 1
