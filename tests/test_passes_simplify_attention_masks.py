"""Masks that are known at compile time, and hide nothing or all that comes later, are left to the kernel."""

import pytest
import torch
from architectures import compile_model
from attentions import LENGTH, heads, options, simplified
from graphs import WIDTH, Lambda, apply, captured, linear, reasons, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_token_ids, tiny_model
from torch.nn import functional as F
from transformers import StaticCache

import quarot_fx
from quarot_fx import compile_time
from quarot_fx.capture import INPUT
from quarot_fx.float64 import relative_difference
from quarot_fx.inspection import capture_one_graph
from quarot_fx.passes.simplify_attention import SimplifyAttention
from quarot_fx.store import WeightStore

INF = float("inf")


def attend(mask, queries=LENGTH, **options):
    """Attention of two heads over LENGTH keys, with a mask that a function of the queries makes."""

    def forward(m, x, *inputs):
        q, k, v = m.qkv(x).split(4, -1)
        return F.scaled_dot_product_attention(q[:, :, -queries:], k, v, attn_mask=mask(x, *inputs), **options)

    return Lambda(forward, qkv=linear(12))


def positions(length=LENGTH):
    return torch.arange(length)


def filled_above(x):
    mask = torch.empty(LENGTH, LENGTH)
    mask.fill_(-INF)
    return mask.triu_(1)


CAUSAL = {
    "tril": lambda x: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
    "compared": lambda x: positions()[None] <= positions()[:, None],
    "of each in the batch": lambda x: (positions()[None] <= positions()[:, None]).expand(2, 1, -1, -1),
    "made for each in the batch": lambda x: torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril(),
    "combined": lambda x: (positions()[None] <= positions()[:, None]) & (positions() < 9) & torch.ones((), dtype=bool),
    "added": lambda x: torch.full((LENGTH, LENGTH), -INF).triu(1),
    "filled in place": filled_above,
    "chosen from literals": lambda x: torch.where(
        torch.ones(LENGTH, LENGTH).tril() > 0, torch.tensor(0.0), torch.tensor(-INF)
    ),
    "after the example of an input": lambda x: torch.ones_like(x[0, 0, :, :LENGTH], dtype=torch.bool).tril(),
    "a wide window": lambda x: (positions()[:, None] - positions()).abs().lt(LENGTH).tril(),
}
EMPTY = {
    "ones": lambda x: torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "one number": lambda x: torch.ones(1, 1, dtype=torch.bool),
    "keys": lambda x: positions()[None] >= 0,
    "added": lambda x: torch.zeros(2, 1, LENGTH, LENGTH),
}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_mask(spelling):
    attention, rest, report = simplified(attend(CAUSAL[spelling]), heads())
    assert (report.matched, report.declined) == (1, [])
    assert options(attention) == {"is_causal": True}
    assert set(rest) == {"linear", "split", "slice", "scaled_dot_product_attention"}


@pytest.mark.parametrize("spelling", EMPTY)
def test_mask_that_hides_nothing(spelling):
    attention, rest, report = simplified(attend(EMPTY[spelling]), heads())
    assert (report.matched, report.declined) == (1, [])
    assert options(attention) == {}
    assert set(rest) == {"linear", "split", "slice", "scaled_dot_product_attention"}


def test_one_query_sees_all_keys():
    mask = lambda x: (positions() <= LENGTH - 1)[None]  # noqa: E731
    attention, _, report = simplified(attend(mask, queries=1), heads())
    assert (report.matched, options(attention)) == (1, {})


def test_other_arguments_stay():
    attention, _, _ = simplified(attend(CAUSAL["tril"], scale=0.3), heads())
    assert options(attention) == {"is_causal": True, "scale": 0.3}


def test_attention_that_is_causal_already_stays_so():
    attention, _, report = simplified(attend(EMPTY["ones"], is_causal=True), heads())
    assert (report.matched, options(attention)) == (1, {"is_causal": True})


OTHER = {
    "a window": lambda x: (positions()[:, None] - positions()).abs().lt(2).tril(),
    "the other triangle": lambda x: torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(),
    "one key hidden": lambda x: positions()[None] > 0,
    "strictly earlier keys": lambda x: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1),
    "two in the batch": lambda x: torch.stack([CAUSAL["tril"](x), EMPTY["ones"](x)])[:, None],
}


@pytest.mark.parametrize("spelling", OTHER)
def test_other_pattern(spelling):
    attention, _, report = simplified(attend(OTHER[spelling]), heads())
    expected = "the mask hides other keys than all later ones, as a sliding window does"
    assert (report.matched, reasons(report)) == (0, [expected])
    assert len(attention.all_input_nodes) == 4


@pytest.mark.parametrize("rows", [slice(3), slice(-3, None)])
def test_fewer_queries_than_keys(rows):
    mask = lambda x: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[rows]  # noqa: E731
    _, _, report = simplified(attend(mask, queries=3), heads())
    assert (report.matched, len(report.declined)) == (0, 1)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9, 0.5, float("nan")])
def test_added_numbers_hide_nothing_for_certain(low):
    _, _, report = simplified(attend(lambda x: torch.full((LENGTH, LENGTH), low).triu(1)), heads())
    assert reasons(report) == ["the mask adds other numbers than 0 and -inf"]


def test_mask_that_depends_on_an_input():
    mask = torch.ones(LENGTH, dtype=torch.bool)
    _, _, report = simplified(attend(lambda x, mask: mask & CAUSAL["tril"](x)), heads(), mask)
    assert reasons(report) == ["the mask depends on the input 'args_1'"]


def test_mask_that_depends_on_a_parameter():
    module = Lambda(lambda m, x: F.scaled_dot_product_attention(x, x, x, m.bias.triu(1)), bias=(LENGTH, LENGTH))
    _, _, report = simplified(module, heads())
    assert reasons(report) == ["the mask depends on the stored tensor 'bias'"]


def test_mask_that_depends_on_random_numbers():
    result = SimplifyAttention()(captured(attend(lambda x: torch.rand(LENGTH, LENGTH) < 2), heads()))
    assert reasons(result.reports[-1]) == [
        "the mask depends on aten.rand.default, whose result differs from call to call"
    ]


def test_mask_that_is_too_large_to_compute(monkeypatch):
    monkeypatch.setattr(compile_time, "LARGEST", LENGTH * LENGTH - 1)
    _, _, report = simplified(attend(CAUSAL["tril"]), heads())
    assert "which is not computed at compile time" in reasons(report)[0]


def test_one_mask_of_many_attentions_is_judged_once(monkeypatch):
    judged = []
    judge = quarot_fx.passes.simplify_attention.pattern_of
    monkeypatch.setattr(
        quarot_fx.passes.simplify_attention, "pattern_of", lambda mask: judged.append(mask) or judge(mask)
    )

    def forward(m, x):
        mask = CAUSAL["tril"](x)
        for _ in range(3):
            x = F.scaled_dot_product_attention(m.q(x), x, x, mask)
        return x

    _, _, report = simplified(Lambda(forward, q=linear(WIDTH)), heads())
    assert (report.matched, len(judged)) == (3, 1)


@st.composite
def masks(draw, depth=2):
    """Functions that make masks [LENGTH, LENGTH], or what broadcasts to it."""
    if depth and draw(st.booleans()):
        left, right = draw(masks(depth - 1)), draw(masks(depth - 1))
        operator = draw(st.sampled_from([torch.logical_and, torch.logical_or]))
        return lambda: operator(left(), right())
    offset = draw(st.integers(-LENGTH, LENGTH))
    return draw(
        st.sampled_from(
            [
                lambda: torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None] + offset,
                lambda: (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() <= offset,
                lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(offset),
                lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(offset),
                lambda: torch.full((LENGTH, LENGTH), offset > 0),
                lambda: torch.arange(LENGTH)[None] < offset,
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(mask=masks(), is_added=st.booleans())
def test_any_mask_made_of_factories_leaves_the_output(mask, is_added):
    def make(x):
        return torch.where(mask(), 0.0, -INF) if is_added else mask()

    seen = mask().expand(LENGTH, LENGTH)
    _, _, report = simplified(attend(make), heads())
    is_simple = bool(seen.all()) or torch.equal(seen, seen.new_ones(LENGTH, LENGTH).tril())
    assert (report.matched, len(report.declined)) == ((1, 0) if is_simple else (0, 1))


# -- models ----------------------------------------------------------------------------------------


def simplified_model(model, ids, **inputs):
    """Return the attentions' options, what else remains in the graph, and the report."""
    graph, arguments = capture_one_graph(model, {"input_ids": ids, **inputs})
    program = graph.bind(arguments, WeightStore())
    given = [arguments[node.meta[INPUT]] for node in program.graph.find_nodes(op="placeholder")]
    result, report = apply(SimplifyAttention(), program, *given)
    attentions = result.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return [options(node) for node in attentions], targets(result), report


SIMPLE = {"is_causal": True, "scale": 0.25, "enable_gqa": True}
OF_MASKS = {"__and__", "diff"}


@pytest.mark.parametrize(
    ("model_type", "config"), [("llama", {}), ("mistral", {"sliding_window": 16}), ("mixtral", {"sliding_window": 32})]
)
def test_causal_model(model_type, config):
    attentions, rest, report = simplified_model(
        tiny_model(model_type, **config), random_token_ids(2, 16), use_cache=False
    )
    assert (report.matched, report.declined) == (4, [])  # a mask and repeated heads in each of two layers
    assert attentions == [SIMPLE] * 2
    assert not OF_MASKS & set(rest)


def test_sliding_window_shorter_than_the_prompt():
    _, rest, report = simplified_model(
        tiny_model("mistral", sliding_window=8), random_token_ids(2, 16), use_cache=False
    )
    assert report.matched == 0
    assert reasons(report) == ["the mask hides other keys than all later ones, as a sliding window does"] * 2
    assert set(rest) >= OF_MASKS


def test_layers_with_and_without_a_window():
    model = tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    attentions, _, report = simplified_model(model, random_token_ids(2, 16), use_cache=False)
    assert (report.matched, len(report.declined)) == (2, 1)
    assert attentions[1] == SIMPLE
    assert "attn_mask" in attentions[0]


def test_padded_batch():
    ids = random_token_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    _, _, report = simplified_model(tiny_model("llama"), ids, attention_mask=mask, use_cache=False)
    assert (report.matched, reasons(report)) == (0, ["the mask depends on the input 'attention_mask'"] * 2)


def test_decode_with_a_static_cache():
    model = tiny_model("llama")
    ids = random_token_ids(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    _, _, report = simplified_model(model, ids[:, :1], past_key_values=cache)
    assert report.matched == 0
    assert len(report.declined) == 2
    assert all(reason.startswith("the mask depends on the input 'past_key_values") for reason in reasons(report))


def test_dynamic_shapes():
    inputs = {"input_ids": random_token_ids(2, 16), "use_cache": False}
    exported = torch.export.export(
        tiny_model("llama"),
        (),
        inputs,
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length")}, "use_cache": None},
    )
    result = SimplifyAttention()(exported)
    assert reasons(result.reports[-1]) == ["the mask has sizes that are known only at run time"] * 2


def test_attention_that_is_written_out_stays():
    model = tiny_model("gpt2", attn_implementation="eager")
    attentions, rest, report = simplified_model(model, random_token_ids(2, 16), use_cache=False)
    assert (attentions, report.matched, report.declined) == ([], 0, [])
    assert rest.count("softmax") == 2


def test_model_through_the_backend(graphs):
    model, ids = tiny_model("llama"), random_token_ids(2, 16)
    compiled = compile_model(model, pipeline="simplify-attention", nested_backend="aot_eager", check=True)
    with torch.no_grad():
        logits, expected = (one(ids, use_cache=False).logits for one in (compiled, model))
    assert relative_difference([logits], [expected]) < 1e-5
    assert graphs() == 1
