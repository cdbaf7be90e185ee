import pytest
from graphs import WHY_NOT_FUSED, Lambda, apply, captured, linear, node_named, reasons, rewritten, targets, tokens
from torch.nn import functional as F
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fuse_gates import FuseGates
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.fuse_norm_linears import FuseNormLinears
from quarot_fx.passes.fuse_norms import FuseNorms
from quarot_fx.passes.merge_int_linears import MergeIntLinears
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.passes.recognize_norms import RecognizeNorms

WIDTH = 256
FUSED = "quarot.norm_int_linear.default"
TOKEN = tokens(1, 1, WIDTH)
BEFORE = (QuantizeWeights, QuantizeActivations, FuseIntLinears, FuseGates, MergeIntLinears, FuseNorms)


def norm(x):
    return F.rms_norm(x, (WIDTH,), eps=1e-3)


def fused(module, x=TOKEN, kernels="reference", **options):
    """Fuse, and check that the result is the same but for codes at the border of two."""
    config = QuarotConfig(kernels="reference", **options)
    program = rewritten(RecognizeNorms()(captured(module, x)), *(one(config) for one in BEFORE))
    result, report = apply(FuseNormLinears(QuarotConfig(kernels=kernels, **options)), program, x)
    expected = program.graph_module(x)
    assert_close(result.graph_module(x), expected, rtol=0, atol=0.02 * expected[0].abs().max().item())
    return result, report


def wide(rows=32, **how):
    return linear(rows, WIDTH, **how)


# -- what is fused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_and_the_product_after_it(bias):
    result, report = fused(Lambda(lambda m, x: (m.a(norm(x)),), a=wide(bias=bias)))
    assert (report.matched, report.declined) == (1, [])
    assert targets(FoldConstants()(result)) == ["norm_int_linear"]
    product = node_named(result, FUSED)
    assert product.args[2] == 1e-3
    assert [one.parameter for one in product.meta[LAYERS]] == ["a.weight"]


def test_a_residual():
    result, report = fused(Lambda(lambda m, x: (x + m.a(norm(x)),), a=wide(WIDTH)))
    assert (report.matched, report.declined) == (1, [])
    assert node_named(result, FUSED).args[8].op == "placeholder"


def test_a_gate():
    module = Lambda(lambda m, x: (lambda y: (F.silu(m.a(y)) * m.b(y),))(norm(x)), a=wide(), b=wide())
    result, report = fused(module)
    assert (report.matched, report.declined) == (1, [])
    assert node_named(result, FUSED).args[-1] == "silu"


def test_products_that_became_one():
    module = Lambda(lambda m, x: (lambda y: (m.a(y), m.b(y)))(norm(x)), a=wide(), b=wide(16))
    result, report = fused(module)
    assert (report.matched, report.declined) == (1, [])
    assert node_named(result, FUSED).meta["val"].shape == (1, 1, 48)


# -- what is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"a_sym": False}, "codes are in another type than int8, or have zero points"),
        ({"w_sym": False}, "the weight has zero points"),
        ({"w_bits": 8}, "the weight has 8 bits, and the kernel takes 4"),
        ({"w_group": 64}, "a scale is of a group"),
        ({"a_group": 64}, "a scale is of a group"),
    ],
)
def test_other_codes(options, reason):
    result, report = fused(Lambda(lambda m, x: (m.a(norm(x)),), a=wide()), **options)
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "norm_quantize" in targets(result)


def test_several_tokens():
    _, report = fused(Lambda(lambda m, x: (m.a(norm(x)),), a=wide()), tokens(1, 2, WIDTH))
    assert reasons(report) == ["an activation (1, 2, 256) has more tokens than 1, or is not known to have no more"]


def test_products_that_stay_two():
    module = Lambda(lambda m, x: (lambda y: (m.a(y), x + m.b(y)))(norm(x)), a=wide(), b=wide(WIDTH))
    _, report = fused(module)
    assert report.matched == 0
    assert [reason.rpartition(" ")[0] for reason in reasons(report)] == ["the same codes are read by"] * 2


def test_a_norm_that_takes_a_direction_out():
    _, report = fused(Lambda(lambda m, x: (m.a(F.layer_norm(x, (WIDTH,))),), a=wide()))
    assert reasons(report) == ["the norm adds to the stream, or takes a direction out of it"]


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    result, report = fused(Lambda(lambda m, x: (m.a(norm(x)),), a=wide()), kernels=kernels)
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "norm_quantize" in targets(result)
