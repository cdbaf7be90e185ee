import copy

import pytest
import torch
from architectures import compile_model
from graphs import (
    WIDTH,
    Lambda,
    apply,
    captured,
    difference,
    fill,
    linear,
    node_named,
    reasons,
    rewritten,
    targets,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_token_ids, tiny_model
from torch.nn import functional as F
from transformers import StaticCache

import quarot_fx
from quarot_fx import compile_time
from quarot_fx.aliasing import argument
from quarot_fx.capture import INPUT
from quarot_fx.coverage import cover
from quarot_fx.float64 import relative_difference
from quarot_fx.graph import FROZEN
from quarot_fx.inspection import capture_one_graph
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.quantize_caches import QuantizeCaches
from quarot_fx.passes.rotate import Rotate
from quarot_fx.passes.simplify_attention import FUSED_KERNELS, SimplifyAttention
from quarot_fx.store import WeightStore

ATTENTION = "aten.scaled_dot_product_attention.default"
LENGTH = 5
INF = float("inf")


def attend(mask, queries=LENGTH, **options):
    """Attention of two heads over LENGTH keys, with a mask that a function of the queries makes."""

    def forward(m, x, *inputs):
        q, k, v = m.qkv(x).split(4, -1)
        return F.scaled_dot_product_attention(q[:, :, -queries:], k, v, attn_mask=mask(x, *inputs), **options)

    return Lambda(forward, qkv=linear(12))


def heads():
    return tokens(2, 2, LENGTH, WIDTH)


def simplified(module, *inputs):
    """Return the attention node, what remains in the graph, and the report."""
    result, report = apply(SimplifyAttention(), captured(module, *inputs), *inputs)
    return node_named(result, ATTENTION), targets(result), report


def options(attention):
    """Return the arguments of an attention, but for its three tensors, that are not the default."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return {name: given for name in names if (given := argument(attention, name)) not in (None, False, 0.0)}


# -- masks -----------------------------------------------------------------------------------------


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


# -- repeated heads --------------------------------------------------------------------------------

PARTS = {"q": linear(WIDTH), "k": linear(8), "v": linear(8), "o": linear(WIDTH)}
REPETITIONS = {
    "expand and reshape": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, -1, 4),
    "expand and flatten": lambda t: t.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "repeat and view": lambda t: t.unsqueeze(2).repeat(1, 1, 2, 1, 1).view(2, 4, -1, 4),
    "repeat_interleave": lambda t: t.repeat_interleave(2, dim=1),
    "copied": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).clone().reshape(2, 4, -1, 4).contiguous(),
    "before heads are moved": lambda t: (
        t.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(2, -1, 4, 4).permute(0, 2, 1, 3)
    ),
}


def grouped(repeat, repeat_values=None, mask=lambda: None, **options):
    """Four heads of four that share two keys and values."""

    def forward(m, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        mixed = F.scaled_dot_product_attention(q, repeat(k), (repeat_values or repeat)(v), mask(), **options)
        return m.o(mixed.transpose(1, 2).flatten(2))

    return Lambda(forward, **PARTS)


def shapes(attention):
    return [tuple(node.meta["val"].shape) for node in attention.args]


@pytest.mark.parametrize("spelling", REPETITIONS)
def test_heads_are_not_repeated(spelling):
    attention, rest, report = simplified(grouped(REPETITIONS[spelling]), tokens())
    assert (report.matched, report.declined) == (1, [])
    assert options(attention) == {"enable_gqa": True}
    assert shapes(attention) == [(2, 4, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4)]
    assert not {"expand", "repeat", "repeat_interleave", "clone"} & set(rest)


def test_a_single_head_of_keys_and_values():
    def forward(m, x):
        q, k, v = m.q(x).unflatten(-1, (-1, 4)).transpose(1, 2), m.k(x)[:, None], m.v(x)[:, None]
        return F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))

    attention, rest, report = simplified(Lambda(forward, q=linear(WIDTH), k=linear(4), v=linear(4)), tokens())
    assert (report.matched, shapes(attention)[1:]) == (1, [(2, 1, 3, 4)] * 2)
    assert "expand" not in rest


@pytest.mark.parametrize(
    "repeat",
    [
        lambda t: t.repeat(1, 2, 1, 1),  # all heads in turn, which is another order
        lambda t: t[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, -1, 4),  # likewise
        lambda t: torch.cat((t, t), 1),
        lambda t: t.repeat_interleave(2, dim=2).reshape(2, 4, 3, 4),  # tokens, which end up in other heads
        lambda t: t.repeat_interleave(2, dim=-1).reshape(2, 4, 3, 4),
    ],
)
def test_what_repeats_no_head_in_a_row_stays(repeat):
    program = captured(grouped(repeat), tokens())
    result, report = apply(SimplifyAttention(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)


@pytest.mark.parametrize(
    "repeat",
    [
        lambda t: t.repeat_interleave(2, dim=2),
        lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(2, 3),
        lambda t: t[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2, 3),
    ],
)
def test_repeated_tokens_stay(repeat):
    module = Lambda(lambda m, x: F.scaled_dot_product_attention(m.q(x), repeat(x), repeat(x)), q=linear(WIDTH))
    _, _, report = simplified(module, heads())
    assert (report.matched, report.declined) == (0, [])


def test_one_head_of_queries_reads_many():
    def forward(m, x):
        keys = x.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(m.q(x)[:, :1], keys, keys)

    _, _, report = simplified(Lambda(forward, q=linear(WIDTH)), heads())
    assert reasons(report) == ["heads stay repeated: queries, keys and values do not form groups"]


def test_only_keys_are_repeated():
    def tiled(values):
        return values.repeat(1, 2, 1, 1)

    _, _, report = simplified(grouped(REPETITIONS["repeat_interleave"], tiled), tokens())
    assert reasons(report) == ["heads stay repeated: queries, keys and values do not form groups"]


def test_sizes_known_at_run_time():
    exported = torch.export.export(
        fill(grouped(REPETITIONS["repeat_interleave"], is_causal=True)),
        (tokens(),),
        dynamic_shapes={"args": ({1: torch.export.Dim("length")},)},
    )
    result = SimplifyAttention()(exported)
    expected = "heads stay repeated: attention has sizes that are known only at run time"
    assert reasons(result.reports[-1]) == [expected]


def test_heads_that_are_changed_in_place_later():
    program = captured(grouped(REPETITIONS["repeat_interleave"]), tokens())
    for index in range(2):
        node_named(program, "aten.repeat_interleave.self_int", index).args[0].meta[FROZEN] = "something writes it"
    result, report = apply(SimplifyAttention(), program, tokens())
    assert (report.matched, targets(result)) == (0, targets(program))


def test_heads_stay_repeated_where_a_mask_stays():
    module = grouped(REPETITIONS["repeat_interleave"], mask=lambda: torch.ones(3, 3, dtype=torch.bool).triu())
    _, rest, report = simplified(module, tokens())
    assert (report.matched, len(report.declined)) == (0, 1)
    assert rest.count("repeat_interleave") == 2


def test_heads_are_not_repeated_after_they_were_quantised():
    quantized = rewritten(captured(grouped(REPETITIONS["expand and reshape"]), tokens()), QuantizeCaches())
    result, report = apply(SimplifyAttention(), quantized, tokens())
    assert (report.matched, report.declined) == (1, [])
    assert "expand" not in targets(result)
    assert [record.bits for record in cover(result).caches] == [4, 4]


def test_a_second_run_finds_nothing():
    program = captured(
        grouped(REPETITIONS["expand and reshape"], mask=lambda: torch.ones(3, 3, dtype=torch.bool).tril()), tokens()
    )
    result, report = apply(SimplifyAttention(), program, tokens())
    assert report.matched == 2
    again, report = apply(SimplifyAttention(), result, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert again.graph_module.code == result.graph_module.code


def on_gpu(program):
    """A program whose values say that they are on a GPU."""
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"].fake_device = torch.device("cuda:0")
    return program


@pytest.mark.parametrize("kernels", [(), ("can_use_flash_attention",), ("can_use_cudnn_attention",)])
def test_a_gpu_needs_a_fused_kernel_that_takes_groups(kernels, monkeypatch):
    asked = []
    for name in FUSED_KERNELS:
        takes = name in kernels
        monkeypatch.setattr(torch.backends.cuda, name, lambda params, takes=takes: asked.append(params) or takes)
    monkeypatch.setattr("quarot_fx.passes.simplify_attention.fake_result", lambda node, mode: node.meta["val"])
    program = on_gpu(captured(grouped(REPETITIONS["repeat_interleave"], is_causal=True), tokens()))
    result = SimplifyAttention()(program)
    report = result.reports[-1]
    assert all(params.enable_gqa and params.is_causal and params.attn_mask is None for params in asked)
    assert [tuple(asked[0].key.shape), tuple(asked[0].query.shape)] == [(2, 2, 3, 4), (2, 4, 3, 4)]
    if kernels:
        assert (report.matched, report.declined) == (1, [])
        assert "repeat_interleave" not in targets(result)
    else:
        expected = "heads stay repeated: no fused kernel of the device 'cuda' takes groups"
        assert (report.matched, reasons(report)) == (0, [expected])
        assert targets(result) == targets(program)


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


def test_quantised_model_reads_each_head_once():
    report = quarot_fx.explain(
        tiny_model("llama"), {"input_ids": random_token_ids(2, 16), "use_cache": False}, w_clip=1
    )
    simplified = next(one for one in report.passes if one.name == "simplify-attention")
    assert (simplified.matched, simplified.declined) == (4, [])
    assert report.coverage.quantized_keys == report.coverage.quantized_values == 2


def test_model_through_the_backend(graphs):
    model, ids = tiny_model("llama"), random_token_ids(2, 16)
    compiled = compile_model(model, pipeline="simplify-attention", nested_backend="aot_eager", check=True)
    with torch.no_grad():
        logits, expected = (one(ids, use_cache=False).logits for one in (compiled, model))
    assert relative_difference([logits], [expected]) < 1e-5
    assert graphs() == 1


def test_rotations_are_placed_afterwards_as_before():
    program = captured(grouped(REPETITIONS["expand and reshape"], mask=lambda: torch.ones(3, 3).tril() > 0), tokens())
    passes = PlaceRotations(), Rotate()
    plain, result = rewritten(program, *passes), rewritten(program, SimplifyAttention(), *passes)
    assert difference(result, program, tokens()) < 1e-9
    assert [(site.kind, site.rotated) for site in result.plan.sites] == [
        (site.kind, site.rotated) for site in plain.plan.sites
    ]
    quantized = rewritten(result, QuantizeCaches())
    assert [record.bits for record in cover(quantized).caches] == [4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "matched"), [(torch.bfloat16, 2), (torch.float64, 1)])
def test_on_a_gpu(dtype, matched):
    """No fused kernel takes float64."""
    module = grouped(REPETITIONS["expand and reshape"], mask=lambda: torch.ones(3, 3, device="cuda").tril() > 0)
    x = tokens().to("cuda", dtype)
    program = captured(copy.deepcopy(module).to("cuda", dtype), x)
    result = SimplifyAttention()(program)
    assert result.reports[-1].matched == matched
    torch.testing.assert_close(result.graph_module(x), program.graph_module(x))
