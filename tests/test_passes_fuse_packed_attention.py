import pytest
import torch
from graphs import WHY_NOT_FUSED, Lambda, apply, captured, linear, node_named, reasons, targets, tokens

from quarot_fx.attention import ATTENTION
from quarot_fx.config import QuarotConfig
from quarot_fx.passes.fuse_packed_attention import FusePackedAttention

REFERENCE = QuarotConfig(kernels="reference")
quarot = torch.ops.quarot
KEYS, SIZE = 6, 16


def stored(bits=4, group=None, size=SIZE):
    """Keys or values of two heads, as a cache holds them."""
    codes, scale, zero = quarot.quantize_asymmetric(tokens(2, 2, KEYS, size), bits, group, 1.0)
    return quarot.pack(codes, bits), scale, zero


def numbers(held, bits=4, size=SIZE):
    codes, scale, zero = held
    return quarot.dequantize(quarot.unpack(codes, bits, size, False), scale, zero, torch.float32)


def decoder(keys=numbers, values=numbers, mask=None):
    """Attention of four heads to what becomes of two caches."""

    def forward(m, x, *held):
        q = m.q(x).unflatten(-1, (4, SIZE)).transpose(1, 2)
        return quarot.attend(q, keys(held[:3]), values(held[3:]), mask, 0.3).transpose(1, 2).flatten(2)

    return Lambda(forward, q=linear(4 * SIZE))


def fused(module, keys=(), values=(), config=REFERENCE):
    inputs = [tokens(2, 3, 16), *stored(*keys), *stored(*values)]
    return apply(FusePackedAttention(config), captured(module, *inputs), *inputs)


def with_bits(bits, size=SIZE):
    return lambda held: numbers(held, bits, size)


@pytest.mark.parametrize("k_bits", [2, 4])
@pytest.mark.parametrize("v_bits", [3, 4, 8])
def test_keys_and_values_have_bits_of_their_own(k_bits, v_bits):
    result, report = fused(decoder(with_bits(k_bits), with_bits(v_bits)), (k_bits,), (v_bits,))
    assert (report.matched, report.declined) == (1, [])
    assert targets(result).count("attend_packed") == 1
    assert not {"attend", "unpack", "dequantize"} & set(targets(result))
    _, *held, mask, scale, first, second, size = node_named(result, "quarot.attend_packed.default").args
    assert {node.op for node in held} == {"placeholder"}
    assert (mask, scale, first, second, size) == (None, 0.3, k_bits, v_bits, SIZE)


def test_groups():
    _, report = fused(decoder(), (4, 8), (4, 4))
    assert report.matched == 1


def test_values_of_another_size():
    result, report = fused(decoder(values=with_bits(4, 7)), (), (4, None, 7))
    assert report.matched == 1
    assert node_named(result, "quarot.attend_packed.default").args[-1] == 7


def test_it_stands_for_the_same_attention():
    inputs = [tokens(2, 3, 16), *stored(), *stored()]
    program = captured(decoder(), *inputs)
    node_named(program, "quarot.attend.default").meta[ATTENTION] = "scaled_dot_product_attention"
    result, _ = apply(FusePackedAttention(REFERENCE), program, *inputs)
    assert node_named(result, "quarot.attend_packed.default").meta[ATTENTION] == "scaled_dot_product_attention"


DECLINED = {
    "keys are rotated back before they are attended to": decoder(
        keys=lambda held: quarot.rotate(numbers(held), f"hadamard-{SIZE}", -1, 1, True)
    ),
    "values are not stored as packed codes, and the others are": decoder(values=lambda held: numbers(held) * 2),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_left_alone_is_named(reason):
    result, report = fused(DECLINED[reason])
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "attend_packed" not in targets(result)


def test_a_cache_of_numbers_is_no_case():
    _, report = fused(decoder(*[lambda held: numbers(held) * 2] * 2))
    assert (report.matched, report.declined) == (0, [])


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_the_graph_stays(kernels, reason):
    result, report = fused(decoder(), config=QuarotConfig(kernels=kernels))
    assert (report.matched, reasons(report)) == (0, [reason])
    assert targets(result).count("attend") == 1


@pytest.mark.kernels
def test_bits_that_have_no_kernel_are_named():
    pytest.importorskip("triton")
    result, report = fused(decoder(with_bits(3), with_bits(3)), (3,), (3,), QuarotConfig())
    expected = "triton: codes of 3 bits have no kernel; those of 2, 4 and 8 have"
    if torch.cuda.is_available():  # the graph is on the CPU
        expected = WHY_NOT_FUSED["auto"]
    assert reasons(report) == [expected]
    assert targets(result).count("attend") == 1
