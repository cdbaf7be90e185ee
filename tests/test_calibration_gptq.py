"""GPTQ against the textbook: one column after another, with the inverse Hessian updated explicitly, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_fx.calibration.gptq import gptq_round
from quarot_fx.calibration.hessian import Hessian, damped, inverse_factor, upper_factor
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.config import QuantScheme
from quarot_fx.errors import HessianError, OptionError, UnknownOptionError
from quarot_fx.ops import quantize_weight
from quarot_fx.ops.affine import decode, encode

ROWS, SIZE = 6, 24
SCHEMES = {
    "symmetric": QuantScheme(4, None, True, 1.0),
    "asymmetric": QuantScheme(3, None, False, 0.9),
    "searched": QuantScheme(4, None, True, "search"),
    "groups": QuantScheme(4, 8, True, 1.0),
    "asymmetric groups": QuantScheme(4, 6, False, 1.0),
}


def problem(seed=0, rows=ROWS, size=SIZE, samples=200):
    """A matrix, and a Hessian of inputs that depend on each other and differ in size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size, dtype=torch.float64, generator=generator)
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
    x = torch.randn(samples, size, dtype=torch.float64, generator=generator) @ (mixing + 0.5 * torch.eye(size))
    return weight, hessian_of(x * torch.linspace(0.3, 3, size))


def hessian_of(x, target=None):
    hessian = Hessian(x.shape[-1], x.device, target is not None)
    hessian.add(x, target)
    return hessian


def error(weight, rounded, hessian):
    change = weight - decode(rounded.codes, rounded.scale, rounded.zero, weight.dtype)
    return float(((change @ hessian.matrix) * change).sum())


def textbook(weight, matrix, scheme, options):
    """Return codes; dynamic scales are those of the weights as updated by all columns before the group."""
    rows, size = weight.shape
    group = scheme.group or size
    order = matrix.diagonal().argsort(descending=True, stable=True) if options.act_order else torch.arange(size)
    inverse = torch.linalg.inv(damped(matrix, options.damping))
    left, codes, known = weight.clone(), torch.empty(rows, size, dtype=torch.int64), {}
    for column in order.tolist():
        start = column // group * group
        if start not in known:
            now = weight if options.group_scales == "static" else left
            known[start] = _scale(now[:, start : start + group], scheme)
        scale, zero = known[start]
        code = encode(left[:, [column]], scale, zero, scheme.bits)
        rounding = left[:, column] - decode(code, scale, zero, weight.dtype)[:, 0]
        codes[:, column] = code[:, 0]
        left = left - torch.outer(rounding, inverse[column]) / inverse[column, column]
        left[:, column] = 0
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column] = inverse[:, column] = 0
        inverse[column, column] = 1  # a column that is done takes no part any more
    return codes


def _scale(part, scheme):
    clip = None if scheme.clip == "search" else scheme.clip
    _, scale, zero = quantize_weight(part, scheme.bits, None, clip, scheme.symmetric)
    return scale, None if scheme.symmetric else zero


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_scales", ["static", "dynamic"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 128])
def test_codes_are_the_textbooks(scheme, group_scales, act_order, block_size):
    if group_scales == "dynamic" and SCHEMES[scheme].group and block_size > 1:
        block_size = 2  # scales are found when a block begins: a group has to begin with one
        act_order = False
    weight, hessian = problem()
    options = GPTQOptions(block_size=block_size, act_order=act_order, group_scales=group_scales, sweeps=0)
    rounded = gptq_round(weight, hessian, SCHEMES[scheme], options)
    assert torch.equal(rounded.codes.long(), textbook(weight, hessian.matrix, SCHEMES[scheme], options))
    nearest = encode(weight, rounded.scale, rounded.zero, SCHEMES[scheme].bits)
    assert not torch.equal(rounded.codes, nearest)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scheme=st.sampled_from(list(SCHEMES)), act_order=st.booleans())
def test_independent_inputs_are_rounded_to_nearest(seed, scheme, act_order):
    weight, _ = problem(seed)
    sizes = torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) + 0.1
    bits, group, symmetric, clip = SCHEMES[scheme].__dict__.values()
    options = GPTQOptions(act_order=act_order, sweeps=0)
    rounded = gptq_round(weight.float(), hessian_of(torch.diag(sizes)), SCHEMES[scheme], options)
    codes, scale, zero = quantize_weight(weight.float(), bits, group, None if clip == "search" else clip, symmetric)
    assert torch.equal(rounded.codes, codes)
    assert torch.equal(rounded.scale, scale)
    assert symmetric or torch.equal(rounded.zero, zero)
    assert rounded.error == rounded.nearest_error > 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scheme=st.sampled_from(list(SCHEMES)))
def test_outputs_change_less_than_by_rounding_to_nearest(seed, scheme):
    weight, hessian = problem(seed, rows=32)
    rounded = gptq_round(weight, hessian, SCHEMES[scheme], GPTQOptions(group_scales="static"))
    assert rounded.error < rounded.nearest_error
    whole = float(((weight @ hessian.matrix) * weight).sum())
    assert rounded.error**2 * whole == pytest.approx(error(weight, rounded, hessian))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_with_act_order_the_order_of_the_inputs_does_not_matter(seed):
    weight, hessian = problem(seed)
    shuffle = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
    shuffled = Hessian(SIZE, weight.device)
    shuffled._moments, shuffled.rows = hessian._moments[shuffle][:, shuffle], hessian.rows
    options, scheme = GPTQOptions(act_order=True, block_size=5, sweeps=0), SCHEMES["symmetric"]
    expected = gptq_round(weight, hessian, scheme, options).codes[:, shuffle]
    assert torch.equal(gptq_round(weight[:, shuffle], shuffled, scheme, options).codes, expected)


@pytest.mark.parametrize("block_size", [1, 3, 7, 24, 100])
def test_blocks_change_speed_and_not_results(block_size):
    weight, hessian = problem()
    codes = [
        gptq_round(weight, hessian, SCHEMES["symmetric"], GPTQOptions(block_size=size)).codes
        for size in (block_size, 8)
    ]
    assert torch.equal(*codes)


def test_rows_are_rounded_alike_alone_and_together():
    weight, hessian = problem()
    whole = gptq_round(weight, hessian, SCHEMES["searched"], GPTQOptions())
    for one, part in zip(whole.split([2, 4]), weight.split([2, 4]), strict=True):
        alone = gptq_round(part, hessian, SCHEMES["searched"], GPTQOptions())
        assert torch.equal(one.codes, alone.codes)
        assert torch.equal(one.scale, alone.scale)
        assert one.error == pytest.approx(alone.error)


# -- the Hessian -------------------------------------------------------------------------------------


def test_a_hessian_is_the_mean_over_all_rows():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(7, x.device)
    for part in x.split([20, 30]):
        hessian.add(part.bfloat16())
    x = x.bfloat16().double()
    torch.testing.assert_close(hessian.matrix, 2 / 50 * x.T @ x, rtol=1e-6, atol=1e-6)
    assert hessian.rows == 50
    assert hessian.shifts is None


def test_factors():
    _, hessian = problem()
    upper = upper_factor(hessian.matrix)
    torch.testing.assert_close(upper @ upper.T, hessian.matrix)
    inverse = inverse_factor(upper)
    torch.testing.assert_close(inverse.T @ inverse, torch.linalg.inv(hessian.matrix))
    assert torch.equal(inverse, inverse.triu())


def test_weights_of_inputs_that_are_always_zero_become_zero():
    weight, _ = problem()
    x = torch.randn(100, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[:, [2, 9]] = 0
    rounded = gptq_round(weight, hessian_of(x), SCHEMES["symmetric"], GPTQOptions())
    assert not rounded.codes[:, [2, 9]].any()
    assert rounded.codes.any(0).sum() == SIZE - 2


def test_without_rows_a_matrix_is_rounded_to_nearest():
    weight, _ = problem()
    rounded = gptq_round(weight, Hessian(SIZE, weight.device), SCHEMES["symmetric"], GPTQOptions())
    assert torch.equal(rounded.codes, encode(weight, rounded.scale, None, 4))


def degenerate():
    """Every input is a multiple of one number."""
    return hessian_of(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, SIZE + 1)).double())


def test_a_degenerate_hessian_is_an_error_that_says_what_to_do():
    weight, _ = problem()
    message = (
        r"the Hessian of 'block.up' \(24 inputs, 8 tokens\) is not positive definite with damping=0: some inputs are "
        r"linear combinations of others. Give more calibration data, raise damping, or give max_damping"
    )
    with pytest.raises(HessianError, match=message):
        gptq_round(weight, degenerate(), SCHEMES["symmetric"], GPTQOptions(damping=0), "block.up")


def test_damping_is_raised_where_that_is_asked_for():
    weight, _ = problem()
    rounded = gptq_round(weight, degenerate(), SCHEMES["symmetric"], GPTQOptions(damping=0, max_damping=0.1))
    assert 0 < rounded.damping <= 0.1
    assert rounded.error < rounded.nearest_error


def test_inputs_that_overflow_are_told_from_dependent_ones():
    weight, _ = problem()
    x = torch.full((4, SIZE), torch.inf, dtype=torch.float64)
    with pytest.raises(HessianError, match=r"its inputs overflow, or are not numbers. Calibrate a model in bfloat16"):
        gptq_round(weight, hessian_of(x), SCHEMES["symmetric"], GPTQOptions(max_damping=1.0))


# -- what a layer is to compute ------------------------------------------------------------------------


def test_the_target_is_what_the_float_model_computes():
    """The weight becomes the least-squares solution for the inputs that there are, rounded."""
    weight, _ = problem()
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(400, SIZE, dtype=torch.float64, generator=generator)
    x = 0.8 * target + 0.3 * torch.randn(400, SIZE, dtype=torch.float64, generator=generator)
    for act_order in (False, True):
        options = GPTQOptions(damping=1e-9, act_order=act_order)
        rounded = gptq_round(weight, hessian_of(x, target), QuantScheme(8, None, True, 1.0), options)
        found = decode(rounded.codes, rounded.scale, None, weight.dtype)
        best = torch.linalg.lstsq(x, target @ weight.T).solution.T
        half_a_step = (rounded.scale / 2).expand_as(best)
        assert (found - best).norm() < half_a_step.norm() < 0.1 * (weight - best).norm()


def test_a_target_that_is_reached_changes_nothing():
    weight, _ = problem()
    x = torch.randn(100, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain, same = (gptq_round(weight, h, SCHEMES["groups"], GPTQOptions()) for h in (hessian_of(x), hessian_of(x, x)))
    assert torch.equal(plain.codes, same.codes)


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 0}, OptionError, "block_size=0: must be an integer, 1 or more"),
        ({"sweeps": -1}, OptionError, "sweeps=-1: must be an integer, 0 or more"),
        ({"damping": -1}, OptionError, "damping=-1: must be a finite number"),
        ({"act_order": 1}, OptionError, "act_order=1: must be True or False"),
        ({"target": "modle"}, UnknownOptionError, "Did you mean 'model'"),
        ({"group_scales": "none"}, UnknownOptionError, "Known: dynamic, static"),
        ({"dampin": 0.1}, UnknownOptionError, "Did you mean 'damping'"),
    ],
)
def test_mistakes_in_options_are_typed(options, error, message):
    with pytest.raises(error, match=message):
        GPTQOptions.from_options(options)
