"""Queries of a group read the key and value that they share: heads are not repeated for them."""

import copy

import pytest
import torch
from attentions import heads, options, simplified
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
from models import random_token_ids, tiny_model
from torch.nn import functional as F

import quarot_fx
from quarot_fx.coverage import cover
from quarot_fx.graph import FROZEN
from quarot_fx.passes.place_rotations import PlaceRotations
from quarot_fx.passes.quantize_caches import QuantizeCaches
from quarot_fx.passes.rotate import Rotate
from quarot_fx.passes.simplify_attention import FUSED_KERNELS, SimplifyAttention

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


def test_quantised_model_reads_each_head_once():
    report = quarot_fx.explain(
        tiny_model("llama"), {"input_ids": random_token_ids(2, 16), "use_cache": False}, w_clip=1
    )
    simplified = next(one for one in report.passes if one.name == "simplify-attention")
    assert (simplified.matched, simplified.declined) == (4, [])
    assert report.coverage.quantized_keys == report.coverage.quantized_values == 2


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
