from dataclasses import replace

import pytest
import torch
from architectures import compile_model
from graphs import WHY_NOT_FUSED, Lambda, apply, captured, linear, node_named, reasons, rewritten, targets, tokens
from models import random_token_ids, tiny_model
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

import quarot_fx
from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.float64 import relative_difference
from quarot_fx.passes.fuse_attention import FuseAttention
from quarot_fx.passes.lower_ops import LowerOps
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.quantize_caches import QuantizeCaches

REFERENCE = QuarotConfig(kernels="reference")
KEYS, SIZE = 6, 4
SHAPES = (2, 3, 4 * SIZE), (2, 2, KEYS, SIZE), (2, 2, KEYS, SIZE)  # what queries are made of, and a cache
REPETITIONS = {
    "expand and reshape": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, -1, SIZE),
    "repeat and view": lambda t: t.unsqueeze(2).repeat(1, 1, 2, 1, 1).view(2, 4, -1, SIZE),
    "repeat_interleave": lambda t: t.repeat_interleave(2, dim=1),
    "copied": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).clone().reshape(2, 4, -1, SIZE).contiguous(),
}
MASKS = {
    "of keys": lambda: torch.arange(KEYS)[None, None, None] < 5,
    "of queries": lambda: torch.ones(3, KEYS, dtype=torch.bool).tril(2),
    "of sequences": lambda: torch.arange(KEYS)[None] < torch.tensor([2, KEYS])[:, None, None, None],
    "of heads": lambda: (torch.arange(4)[:, None, None] != torch.arange(KEYS)).expand(4, 3, KEYS),
    "that hides everything from a query": lambda: (torch.arange(3) != 1)[:, None].expand(3, KEYS),
    "that is added": lambda: torch.where(torch.ones(3, KEYS, dtype=torch.bool).tril(2), 0.5, -torch.inf),
    "of the lowest number": lambda: torch.where(torch.arange(KEYS) < 4, 0.0, torch.finfo(torch.float32).min)[None],
}


def mix(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def decoder(attention=mix):
    """Attention of four heads, whose queries a linear layer makes, to the keys and values of two heads."""

    def forward(m, x, k, v):
        q = m.q(x).unflatten(-1, (4, SIZE)).transpose(1, 2)
        return m.o(attention(q, k, v).transpose(1, 2).flatten(2))

    return Lambda(forward, q=linear(4 * SIZE), o=linear(4 * SIZE))


def fused(attention=mix, shapes=SHAPES, config=REFERENCE):
    """Fuse, and check that the output stays as it is."""
    inputs = [tokens(*shape) for shape in shapes]
    return apply(FuseAttention(config), captured(decoder(attention), *inputs), *inputs)


def assert_fused(result, report):
    """Check that the op is there, and reads the cache itself."""
    assert (report.matched, report.declined) == (1, [])
    _, key, val, *_ = node_named(result, "quarot.attend.default").args
    assert (key.op, val.op) == ("placeholder", "placeholder")
    assert "scaled_dot_product_attention" not in targets(result)


# -- what is fused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", REPETITIONS)
def test_each_key_and_value_is_read_once(spelling):
    repeat = REPETITIONS[spelling]
    assert_fused(*fused(lambda q, k, v: mix(q, repeat(k), repeat(v))))


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    def attention(q, k, v):
        return mix(q, k, v, attn_mask=MASKS[mask]())

    result, report = fused(attention)
    assert_fused(result, report)
    assert node_named(result, "quarot.attend.default").args[3] is not None


@pytest.mark.parametrize(("options", "scale"), [({}, SIZE**-0.5), ({"scale": 0.3}, 0.3)])
def test_the_factor_of_scores(options, scale):
    result, _ = fused(lambda q, k, v: mix(q, k, v, **options))
    assert node_named(result, "quarot.attend.default").args[3:] == (None, scale)


def test_as_many_keys_as_queries_have_no_groups():
    assert_fused(*fused(shapes=((2, 3, 4 * SIZE), (2, 4, KEYS, SIZE), (2, 4, KEYS, 7)), attention=_narrowed))


def _narrowed(q, k, v):
    return mix(q, k, v)[..., :SIZE]


def test_one_token_that_sees_itself():
    shapes = (2, 1, 4 * SIZE), (2, 2, 1, SIZE), (2, 2, 1, SIZE)
    assert_fused(*fused(lambda q, k, v: mix(q, k, v, is_causal=True), shapes))


def test_heads_that_are_repeated_in_turn_stay_so():
    result, report = fused(lambda q, k, v: mix(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)))
    assert report.matched == 1
    assert targets(result).count("repeat") == 2


def test_keys_alone_that_are_repeated_stay_so():
    shapes = *SHAPES[:2], (2, 4, KEYS, SIZE)
    result, report = fused(lambda q, k, v: mix(q, k.repeat_interleave(2, dim=1), v), shapes)
    assert report.matched == 1
    assert targets(result).count("repeat_interleave") == 1


def test_a_cache_of_any_length():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return mix(q, k, v, attn_mask=mask)

    def inputs(length):
        return tokens(2, 4, 1, SIZE), *tokens(2, 2, 2, length, SIZE), (torch.arange(length) < 5)[None, None, None]

    dynamic = torch.export.Dim.AUTO
    shapes = ({}, {2: dynamic}, {2: dynamic}, {3: dynamic})
    exported = torch.export.export(Module(), inputs(KEYS), dynamic_shapes=shapes)
    result = FuseAttention(REFERENCE)(exported)
    assert targets(result).count("attend") == 1
    for length in (KEYS, 11):
        torch.testing.assert_close(result.graph_module(*inputs(length))[0], Module()(*inputs(length)))


# -- what is left alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "shapes", "reason"),
    [
        (mix, ((2, 17, 4 * SIZE), *SHAPES[1:]), "there are more queries than 16, for which PyTorch has kernels"),
        (lambda q, k, v: mix(q, k, v, dropout_p=0.1), SHAPES, "it drops some of the weights at random"),
        (lambda q, k, v: mix(q, k, v, is_causal=True), SHAPES,
         "later keys are hidden without a mask, as in a prompt, for which PyTorch has kernels"),
        (lambda q, k, v: mix(q[:1], k, v), SHAPES,
         "sequences or queries are shared: sizes of queries, keys, values and the mask are broadcast"),
        (lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])[:, None].expand_as(q), SHAPES,
         "queries have 3 axes, and the kernel takes batch, heads, queries and size"),
    ],
    ids=["many", "dropout", "causal", "broadcast", "axes"],
)  # fmt: skip
def test_what_is_left_alone_is_named(attention, shapes, reason):
    inputs = [tokens(*shape) for shape in shapes]
    program = captured(decoder(attention), *inputs)
    result = FuseAttention(REFERENCE)(program)
    assert (result.reports[-1].matched, reasons(result.reports[-1])) == (0, [reason])
    assert targets(result) == targets(program)


def test_queries_that_are_not_counted_stay():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return mix(q, k, v)

    inputs = tokens(2, 4, 3, SIZE), *tokens(2, 2, 2, KEYS, SIZE)
    exported = torch.export.export(Module(), inputs, dynamic_shapes=({2: torch.export.Dim.AUTO}, {}, {}))
    report = FuseAttention(REFERENCE)(exported).reports[-1]
    assert reasons(report) == ["how many queries there are is not known at compile time"]


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_the_graph_stays(kernels, reason):
    repeat = REPETITIONS["expand and reshape"]
    result, report = fused(lambda q, k, v: mix(q, repeat(k), repeat(v)), config=QuarotConfig(kernels=kernels))
    assert (report.matched, reasons(report)) == (0, [reason])
    assert targets(result).count("expand") == 2


@pytest.mark.kernels
def test_a_kernel_attends():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [tokens(*shape).to(device) for shape in SHAPES]
    module = decoder(lambda q, k, v: mix(q, k, v, attn_mask=MASKS["of queries"]().to(device))).to(device)
    program = captured(module, *inputs)
    result = rewritten(program, FuseAttention(), LowerOps())
    assert node_named(result, "quarot_triton.attend.default").users
    torch.testing.assert_close(result.graph_module(*inputs), program.graph_module(*inputs), rtol=1e-5, atol=1e-4)


# -- models ----------------------------------------------------------------------------------------


def test_keys_and_values_are_reported_as_before():
    inputs = [tokens(*shape) for shape in SHAPES]
    program = rewritten(captured(decoder(), *inputs), PlaceRotations(REFERENCE), QuantizeCaches(REFERENCE))
    result, _ = apply(FuseAttention(REFERENCE), program, *inputs)
    assert targets(result).count("attend") == 1
    before, after = ([replace(record, where="") for record in cover(one).caches] for one in (program, result))
    assert [(record.kind, record.bits, record.rotated) for record in after] == [
        (k, 4, "online") for k in ("key", "value")
    ]
    assert before == after


CACHES = {
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
    "dynamic": lambda config: DynamicCache(config=config),
}


def decode(model, kind, bits, **options):
    """Return the logits of a few tokens, one after the other, behind a prompt, and the cache that is left."""
    ids, cache = random_token_ids(2, 20), CACHES[kind](model.config)
    compiled = compile_model(model, w_bits=16, a_bits=16, kv_bits=bits, **options)
    with torch.no_grad():
        logits = [compiled(chunk, past_key_values=cache).logits for chunk in ids.split([17, 1, 1, 1], dim=1)]
    return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize(
    ("kind", "bits", "steps"),
    [("static", 16, 1), ("static", 4, 1), ("dynamic", 16, 2)],  # the first token, and any after it
)
def test_a_model_decodes_as_without(kind, bits, steps, graphs, monkeypatch):
    matched = []
    run = FuseAttention.run

    def counted(self, program, report):
        run(self, program, report)
        matched.append(report.matched)

    monkeypatch.setattr(FuseAttention, "run", counted)
    model = tiny_model("llama").double()
    fused, plain = (decode(model, kind, bits, kernels=kernels) for kernels in ("reference", "none"))
    assert matched[: 1 + steps] == [0, *[2] * steps]  # the prompt, and two layers in each graph that decodes
    assert set(matched[1 + steps :]) == {0}  # without kernels
    for actual, expected in zip(fused, plain, strict=True):
        assert relative_difference(actual, expected) < 1e-6


def test_a_decode_step_is_reported():
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(random_token_ids(2, 5), past_key_values=cache)
        inputs = {"input_ids": random_token_ids(2, 1), "past_key_values": cache}
        report = quarot_fx.rewrite(model, inputs, kernels="reference").quarot
    (fusing,) = (one for one in report.passes if one.name == "fuse-attention")
    assert (fusing.matched, fusing.declined) == (2, [])
    assert report.coverage.quantized_keys == report.coverage.keys == 2
    assert report.coverage.quantized_values == report.coverage.values == 2
    assert {record.rotated for record in report.caches} == {"online"}
