import pytest
from graphs import WHY_NOT_FUSED, Lambda, apply, captured, linear, node_named, reasons, targets, tokens
from torch.nn import functional as F
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes import fuse_float_linears
from quarot_fx.passes.fuse_float_linears import FuseFloatLinears
from quarot_fx.passes.quantize_weights import QuantizeWeights

WIDTH, ROWS = 64, 96
FUSED = "quarot.float_linear.default"
TOKEN = tokens(1, 1, WIDTH)


@pytest.fixture(autouse=True)
def _small_weights_are_large(monkeypatch):
    monkeypatch.setattr(fuse_float_linears, "FEWEST_WEIGHTS", WIDTH * ROWS)


def head(m, x):
    return (m.a(F.rms_norm(x, (WIDTH,))),)


def fused(rows=ROWS, x=TOKEN, kernels="reference", before=(), **how):
    program = captured(Lambda(head, a=linear(rows, WIDTH, **how)), x)
    for one in before:
        program = one(QuarotConfig(overrides={"a.weight": {"w_bits": 8}}))(program)
    result, report = apply(FuseFloatLinears(QuarotConfig(kernels=kernels)), program, x)
    assert_close(result.graph_module(x), program.graph_module(x))
    return result, report


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_weight(bias):
    result, report = fused(bias=bias)
    assert (report.matched, report.declined) == (1, [])
    (layer,) = node_named(result, FUSED).meta[LAYERS]
    assert (layer.parameter, layer.w_bits, layer.a_bits) == ("a.weight", 16, 16)


def test_a_small_one_is_left_alone():
    result, report = fused(rows=ROWS - 1)
    assert (report.matched, report.declined) == (0, [])
    assert "float_linear" not in targets(result)


def test_one_that_is_quantised_is_left_alone():
    result, report = fused(before=(QuantizeWeights,))
    assert (report.matched, report.declined) == (0, [])
    assert "dequantize" in targets(result)


@pytest.mark.parametrize("shape", [(1, 2), (16, 1), (3, 5)])
def test_a_few_tokens(shape):
    _, report = fused(x=tokens(*shape, WIDTH))
    assert (report.matched, report.declined) == (1, [])


def test_many_tokens():
    _, report = fused(x=tokens(1, 17, WIDTH))
    assert reasons(report) == [
        f"an activation (1, 17, {WIDTH}) has more tokens than 16, or is not known to have no more"
    ]


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    _, report = fused(kernels=kernels)
    assert (report.matched, reasons(report)) == (0, [reason])
