import pytest
import torch
from graphs import Lambda, captured, linear, node_named, reasons, rewritten, targets, tokens
from test_passes_fuse_appends import BATCH, HEADS, REFERENCE, ROTATION, SIZE, Scheme, cache, embedded, read, write

from quarot_fx.config import QuarotConfig
from quarot_fx.passes.fuse_appends import FuseAppends
from quarot_fx.passes.pair_appends import PairAppends

quarot = torch.ops.quarot
KEYS, VALUES = Scheme(before=embedded), Scheme(2, 8, clip=1.0)


def heads(product, x):
    return product(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def of_a_layer(first=KEYS, second=VALUES, between=lambda held: 0, shift=0):
    """A module that appends what two linear layers make of x to two caches, and returns what it reads."""

    def run(m, x, length, *held):
        position = torch.arange(x.shape[1]) + length
        write(held[:3], heads(m.a, x), position, first)
        seen = between(held[:3])
        write(held[3:], heads(m.b, x), position + shift if shift else position, second)
        length.add_(x.shape[1])
        return read(held[:3], first).sum() + read(held[3:], second).sum() + seen

    return Lambda(run, a=linear(HEADS * SIZE), b=linear(HEADS * SIZE))


def paired(first=KEYS, second=VALUES, config=REFERENCE, **layer):
    """Pair appends, and check that results and caches are the same."""
    inputs = [tokens(BATCH, 3, 16), torch.tensor(1), *cache(first), *cache(second)]
    program = captured(of_a_layer(first, second, **layer), *inputs)
    result = rewritten(program, FuseAppends(REFERENCE), PairAppends(config))
    ours, theirs = ([x.clone() for x in inputs] for _ in range(2))
    with torch.no_grad():
        actual, expected = (one.graph_module(*given) for one, given in ((result, ours), (program, theirs)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    return result, result.reports[-1]


@pytest.mark.parametrize("schemes", [(KEYS, VALUES), (VALUES, KEYS)])
def test_keys_and_values_of_a_layer_are_appended_together(schemes):
    result, report = paired(*schemes)
    assert (report.matched, report.declined) == (1, [])
    assert {"append", "append_pair"} & set(targets(result)) == {"append_pair"}
    *_, cos, sin, k_balance, v_balance, k_rotation, v_rotation, k_bits, v_bits, k_group, v_group, k_clip, v_clip = (
        node_named(result, "quarot.append_pair.default").args
    )
    assert None not in (cos, sin)
    assert (k_balance, v_balance) == (None, None)
    assert (k_rotation, k_bits, k_group, k_clip) == (ROTATION, 4, None, 0.95)
    assert (v_rotation, v_bits, v_group, v_clip) == (None, 2, 8, 1.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shift": 1}, "what is appended next goes to other positions"),
        ({"second": KEYS}, "what is appended next is embedded as well"),
        ({"between": lambda held: read(held, KEYS).sum()}, "before the next append"),
    ],
)
def test_what_is_appended_apart_is_named(options, reason):
    result, report = paired(**options)
    assert report.matched == 0
    assert reason in reasons(report)[0]
    assert targets(result).count("append") == 2


def test_kernels_none_leaves_both():
    result, _ = paired(config=QuarotConfig(kernels="none"))
    assert targets(result).count("append") == 2
