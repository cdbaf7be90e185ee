import pytest
import torch
from graphs import (
    WIDTH,
    Decoder,
    Lambda,
    apply,
    captured,
    check_code,
    ids,
    linear,
    node_named,
    reasons,
    targets,
    tokens,
)
from torch.nn import functional as F

from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.errors import GroupSizeError
from quarot_fx.passes.quantize_caches import QuantizeCaches

quarot = torch.ops.quarot
PARTS = {"q": linear(WIDTH), "k": linear(8), "v": linear(8), "o": linear(WIDTH)}


def heads(m, x):
    return (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))


def fused(m, x, mix=F.scaled_dot_product_attention):
    """Four heads of four that share two keys and values."""
    q, k, v = heads(m, x)
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
    return m.o(mix(q, k, v).transpose(1, 2).flatten(2))


def written_out(m, x):
    return fused(m, x, lambda q, k, v: torch.softmax(q @ k.transpose(2, 3) * 0.5, -1) @ v)


@pytest.mark.parametrize("attention", [fused, written_out])
def test_each_head_is_quantised_once_before_it_is_repeated(attention):
    program = captured(Lambda(attention, **PARTS), tokens())
    result, report = apply(QuantizeCaches(), program, tokens())
    assert (report.matched, report.declined) == (2, [])
    found = [node for node in result.graph.nodes if "quantize_asymmetric" in str(node.target)]
    assert [node.args[0].meta["val"].shape for node in found] == [(2, 3, 2, 4)] * 2
    check_code(result).check("quantize_asymmetric").check("dequantize").check("expand").run()


def test_bits_and_clip_of_keys_and_values():
    config = QuarotConfig(k_bits=3, v_bits=5, kv_clip=0.8, kv_group=2, kv_sym=True)
    result, _ = apply(QuantizeCaches(config), captured(Lambda(fused, **PARTS), tokens()), tokens())
    found = [node.args[1:] for node in result.graph.nodes if "quantize_symmetric" in str(node.target)]
    assert sorted(found) == [(3, 2, 0.8), (5, 2, 0.8)]


def test_fused_attention_reads_what_was_quantised():
    result, report = apply(QuantizeCaches(), captured(Decoder(), ids()), ids())
    assert report.matched == 2
    attention = node_named(result, "aten.scaled_dot_product_attention.default")
    _, key, value = attention.args[:3]
    assert str(key.target) == "quarot.dequantize.default"  # after rotary positions
    assert str(value.target) == "aten.transpose.int"
    assert str(value.args[0].target) == "quarot.dequantize.default"


@pytest.mark.parametrize(("option", "kind"), [("k_bits", "key"), ("v_bits", "value")])
def test_bits_of_sixteen_leave_alone(option, kind):
    _, report = apply(QuantizeCaches(QuarotConfig(**{option: 16})), captured(Decoder(), ids()), ids())
    assert (report.matched, reasons(report)) == (1, [f"{option}=16 asks to leave {kind}s alone"])


def test_constant_keys_stay():
    module = Lambda(lambda m, x: F.scaled_dot_product_attention(m.q(x)[:, None], m.keys, m.v(x)[:, None]),
                    q=linear(4), v=linear(4), keys=(2, 1, 3, 4))  # fmt: skip
    _, report = apply(QuantizeCaches(), captured(module, tokens()), tokens())
    assert (report.matched, reasons(report)) == (1, ["keys are constant"])


def test_keys_with_head_dim_not_last_are_quantised_along_it():
    """BLOOM keeps its keys as [heads, head_dim, tokens]: they take a scale for each token, too."""

    def attention(m, x, keys):
        return m.o(torch.softmax(m.q(x) @ keys, -1) @ x)

    module = Lambda(attention, q=linear(WIDTH), o=linear(4))
    inputs = tokens(), tokens(2, WIDTH, 5)[..., :3]
    result, report = apply(QuantizeCaches(), captured(module, *inputs), *inputs)
    assert (report.matched, report.declined) == (2, [])
    codes = [node for node in result.graph.nodes if "quantize_asymmetric" in str(node.target)]
    assert {node.args[0].meta["val"].shape for node in codes} == {(2, 3, WIDTH)}
    assert [record.bits for record in cover(result).caches] == [4, 4]


def test_group_that_does_not_divide():
    with pytest.raises(GroupSizeError, match="kv_group=3 does not divide the 4 elements that a key of"):
        QuantizeCaches(QuarotConfig(kv_group=3))(captured(Lambda(fused, **PARTS), tokens()))


def held(x, bits=4):
    """What a cache of codes makes of a tensor."""
    codes, scale, zero = quarot.quantize_asymmetric(quarot.rotate(x, f"hadamard-{x.shape[-1]}"), bits, None, 0.95)
    codes = quarot.unpack(quarot.pack(codes, bits), bits, x.shape[-1], False)
    return quarot.rotate(quarot.dequantize(codes, scale, zero, x.dtype), f"hadamard-{x.shape[-1]}", inverse=True)


def attend(keys_and_values):
    """Attention whose keys and values a function makes of new ones."""

    def forward(m, x):
        q, k, v = (layer(x)[:, None] for layer in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, *keys_and_values(m, k, v))[:, 0])

    return Lambda(forward, up=linear(8, 8), **(PARTS | {"q": linear(8), "o": linear(4, 8)}))


def test_what_a_cache_holds_as_codes_is_not_quantised_again():
    program = captured(attend(lambda m, k, v: (held(k, 4), held(v, 7)[:, :, :2])), tokens())
    result, report = apply(QuantizeCaches(QuarotConfig(kv_bits=16)), program, tokens())
    assert (report.matched, report.declined) == (2, [])
    assert targets(result) == targets(program)
    assert [(record.bits, record.by) for record in cover(result).caches] == [(4, "cache"), (7, "cache")]


def test_keys_that_a_cache_holds_beside_values_that_it_does_not():
    program = captured(attend(lambda m, k, v: (held(k, 8), v)), tokens())
    result, report = apply(QuantizeCaches(), program, tokens())
    assert report.matched == 2
    assert [(record.bits, record.by) for record in cover(result).caches] == [(8, "cache"), (4, "simulation")]


def test_latent_keys_and_values_are_held_as_what_they_are_made_of():
    def latent(m, k, v):
        made = m.up(held(k))
        return torch.cat((made[..., :4], held(v)[..., :4]), -1), made

    program = captured(attend(latent), tokens())
    _, report = apply(QuantizeCaches(), program, tokens())
    assert (report.matched, report.declined) == (2, [])


def test_a_window_of_real_numbers_beside_codes():
    program = captured(
        attend(lambda m, k, v: (torch.cat((held(k), k), 2), torch.cat((held(v), held(v, 2)), 2))), tokens()
    )
    result, report = apply(QuantizeCaches(), program, tokens())
    assert (report.matched, reasons(report)) == (1, ["the cache holds a part of the keys as codes, and a part not"])
    assert [(record.bits, record.by) for record in cover(result).caches] == [(16, "cache"), (4, "cache")]


def test_product_without_softmax_is_no_attention():
    module = Lambda(lambda m, x: m.o(x @ x.mT @ x), o=linear(4))
    program = captured(module, tokens())
    result, report = apply(QuantizeCaches(), program, tokens())
    assert (report.matched, report.declined) == (0, [])
    assert targets(result) == targets(program)
