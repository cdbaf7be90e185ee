"""Decoders that are plain PyTorch: one graph, the plan, rotation that changes nothing, 4 bits, caches of their own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from architectures import compile_model
from decoders import BATCH, LAYERS, STYLES, logits
from models import random_token_ids
from plans import readers_of_online_transforms

from quarot_fx.capture import INPUT
from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.inspection import capture_one_graph
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.store import SHARED

PROMPT, LENGTH = 5, 7
NO_WEIGHTS = {"query", "key", "value", "output"}
STYLE_PARAMETERS = [
    pytest.param(style, marks=pytest.mark.slow if style.is_slow else (), id=style.name) for style in STYLES
]
WITH_CACHES = [parameter for parameter in STYLE_PARAMETERS if parameter.values[0].has_cache]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module", params=STYLE_PARAMETERS)
def style(request):
    return request.param


@pytest.fixture(scope="module")
def program(style):
    """The captured model in float64, so that constants made from its weights are not rounded, and what it is run on."""
    captured, arguments = capture_one_graph(style.build(torch.float64), style.inputs(random_token_ids(BATCH), 0))
    program = captured.bind(arguments, SHARED)
    return program, [arguments[node.meta[INPUT]] for node in program.graph.find_nodes(op="placeholder")]


def test_plan_is_what_one_would_do_by_hand(style, program):
    captured, inputs = program
    rotated = run_pipeline(captured, build_pipeline(QuarotConfig(stop_after="rotate")))
    expected = run_in_float64(captured.graph_module, *inputs)
    assert relative_difference(run_in_float64(rotated.graph_module, *inputs), expected) < 1e-9

    report = cover(rotated)
    assert Counter(readers_of_online_transforms(rotated.graph)) == Counter(style.online * LAYERS)
    linears = Counter(rotated for _, rotated in {(linear.parameter, linear.rotated) for linear in report.linears})
    online = LAYERS * len([name for name in style.online if not set(name.split()) & NO_WEIGHTS])
    assert linears == {"free": style.free, "online": online}
    caches = Counter((cache.kind, cache.rotated) for cache in report.caches)
    assert caches == {("key", style.keys): LAYERS, ("value", style.values): LAYERS}
    assert not any(one.declined for one in report.passes)
    assert report.plan.barriers == ()


def test_all_is_quantised_but_the_head(program, style):
    captured, inputs = program
    quantized = run_pipeline(captured, build_pipeline(QuarotConfig()))
    report = cover(quantized)
    bits = {linear.parameter: (linear.w_bits, linear.a_bits) for linear in report.linears}
    assert {name for name, both in bits.items() if both != (4, 4)} == {style.head}
    assert bits[style.head] == (16, 16)
    assert [cache.bits for cache in report.caches] == [4] * 2 * LAYERS
    outputs, expected = (run_in_float64(one.graph_module, *inputs)[:1] for one in (quantized, captured))
    assert outputs[0].isfinite().all()
    assert 1e-3 < relative_difference(outputs, expected) < 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)], ids=str)
def test_rotation_alone_changes_nothing(style, dtype, tolerance, graphs):
    inputs = style.inputs(random_token_ids(BATCH), 0)
    expected = logits(style.build(dtype)(**inputs))
    result = logits(compile_model(style.build(dtype), stop_after="rotate")(**inputs))
    assert result.dtype == expected.dtype
    assert relative_difference([result], [expected]) < tolerance
    assert graphs() == 1


def generate(style, model, forward, ids, prompt=PROMPT):
    """Return the logits of the prompt at once and of every token after it, and the module's buffers in the end."""
    found, more, start = [], {}, 0
    for chunk in ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1):
        output = forward(**style.inputs(chunk, start), **more)
        found.append(logits(output))
        more, start = style.carry(output) if style.carry else {}, start + chunk.shape[1]
    return torch.cat(found, dim=1), [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("style", WITH_CACHES)
def test_decoding_with_caches_of_its_own(style):
    ids = random_token_ids(BATCH, LENGTH)
    eager, rotated = style.build(), style.build()
    expected, expected_buffers = generate(style, eager, eager, ids)
    result, buffers = generate(style, rotated, compile_model(rotated, stop_after="rotate"), ids)
    assert relative_difference([result], [expected]) < 1e-4
    assert relative_difference(buffers, expected_buffers) < 1e-4  # canonical, as eager leaves them


@pytest.mark.slow
@pytest.mark.parametrize("style", WITH_CACHES)
def test_four_bits_decode_token_by_token_as_at_once(style):
    """In float64 nothing is near enough to a tie to be rounded differently (see ``test_caches``)."""
    ids = random_token_ids(BATCH, LENGTH)
    one, other = style.build(torch.float64), style.build(torch.float64)
    at_once, _ = generate(style, one, compile_model(one), ids, prompt=LENGTH)
    by_token, _ = generate(style, other, compile_model(other), ids, prompt=1)
    assert relative_difference([by_token], [at_once]) < 1e-6
