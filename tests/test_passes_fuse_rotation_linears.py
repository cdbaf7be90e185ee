import pytest
import torch
from graphs import WHY_NOT_FUSED, Lambda, apply, captured, linear, node_named, reasons, rewritten, targets, tokens
from torch.nn import functional as F
from torch.testing import assert_close

from quarot_fx.config import QuarotConfig
from quarot_fx.linear_like import LAYERS
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.fuse_int_linears import FuseIntLinears
from quarot_fx.passes.fuse_rotation_linears import FuseRotationLinears
from quarot_fx.passes.fuse_rotations import FuseRotations
from quarot_fx.passes.merge_int_linears import MergeIntLinears
from quarot_fx.passes.quantize_activations import QuantizeActivations
from quarot_fx.passes.quantize_weights import QuantizeWeights

HEADS, HEAD = 8, 32
WIDTH = HEADS * HEAD
FUSED = "quarot.rotate_int_linear.default"
TOKEN = tokens(1, 1, WIDTH)
BEFORE = (QuantizeWeights, QuantizeActivations, FuseIntLinears, MergeIntLinears, FuseRotations)


def across_heads(x):
    return torch.ops.quarot.rotate(x, f"hadamard-{HEADS}", -1, HEAD)


def fused(module, x=TOKEN, kernels="reference", **options):
    """Fuse, and check that the result is the same but for codes at the border of two."""
    config = QuarotConfig(kernels="reference", **options)
    program = rewritten(captured(module, x), *(one(config) for one in BEFORE))
    result, report = apply(FuseRotationLinears(QuarotConfig(kernels=kernels, **options)), program, x)
    expected = program.graph_module(x)
    assert_close(result.graph_module(x), expected, rtol=0, atol=0.02 * expected[0].abs().max().item())
    return result, report


def wide(rows=32, **how):
    return linear(rows, WIDTH, **how)


# -- what is fused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_rotation_across_heads_and_the_product_after_it(bias):
    result, report = fused(Lambda(lambda m, x: (m.a(across_heads(x)),), a=wide(bias=bias)))
    assert (report.matched, report.declined) == (1, [])
    assert targets(FoldConstants()(result)) == ["rotate_int_linear"]
    product = node_named(result, FUSED)
    assert product.args[1:5] == (f"hadamard-{HEADS}", HEAD, 4, 0.9)
    assert [one.parameter for one in product.meta[LAYERS]] == ["a.weight"]


def test_a_residual():
    result, report = fused(Lambda(lambda m, x: (x + m.a(across_heads(x)),), a=wide(WIDTH)))
    assert (report.matched, report.declined) == (1, [])
    assert node_named(result, FUSED).args[8].op == "placeholder"


# -- what is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"a_sym": False}, "codes are in another type than int8, or have zero points"),
        ({"w_sym": False}, "the weight has zero points"),
        ({"w_bits": 8}, "the weight has 8 bits, and the kernel takes 4"),
        ({"w_group": 64}, "a scale is of a group"),
    ],
)
def test_other_codes(options, reason):
    result, report = fused(Lambda(lambda m, x: (m.a(across_heads(x)),), a=wide()), **options)
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "rotate_quantize" in targets(result)


def test_several_tokens():
    _, report = fused(Lambda(lambda m, x: (m.a(across_heads(x)),), a=wide()), tokens(1, 2, WIDTH))
    assert reasons(report) == ["an activation (1, 2, 256) is more than one token, or not known to be one"]


def test_whole_rows():
    rotated = Lambda(lambda m, x: (m.a(torch.ops.quarot.rotate(x, f"hadamard-{WIDTH}")),), a=wide())
    _, report = fused(rotated)
    assert reasons(report) == [
        "whole rows or heads are rotated, and not across heads: each program would take too long"
    ]


def test_an_activation():
    _, report = fused(Lambda(lambda m, x: (m.a(across_heads(F.silu(x))),), a=wide()))
    assert reasons(report) == ["what is rotated is gated, or an activation's result"]


@pytest.mark.parametrize(("kernels", "reason"), WHY_NOT_FUSED.items())
def test_without_a_kernel_nothing_is_fused(kernels, reason):
    result, report = fused(Lambda(lambda m, x: (m.a(across_heads(x)),), a=wide()), kernels=kernels)
    assert (report.matched, reasons(report)) == (0, [reason])
    assert "rotate_quantize" in targets(result)
