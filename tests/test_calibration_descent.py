"""Coordinate descent against its definition: what it leaves cannot be bettered one code or one scale at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibration_gptq import SCHEMES, SIZE, problem

from quarot_fx.calibration.descent import descend
from quarot_fx.calibration.gptq import gptq_round
from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.rounded import output_squares
from quarot_fx.ops import quantize_weight
from quarot_fx.ops.affine import code_range, decode

SCHEME = st.sampled_from(list(SCHEMES))


def start(scheme, seed=0):
    """A weight, a Hessian, and the weight rounded to nearest."""
    weight, hessian = problem(seed)
    clip = None if scheme.clip == "search" else scheme.clip
    codes, scale, zero = quantize_weight(weight, scheme.bits, scheme.group, clip, scheme.symmetric)
    return weight, hessian.matrix, (codes, scale, None if scheme.symmetric else zero)


def row_errors(weight, hessian, codes, scale, zero):
    return output_squares(weight - decode(codes, scale, zero, weight.dtype), hessian)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), scheme=SCHEME, sweeps=st.integers(1, 3))
def test_no_sweep_raises_the_error_of_a_row(seed, scheme, sweeps):
    weight, hessian, (codes, scale, zero) = start(SCHEMES[scheme], seed)
    before = row_errors(weight, hessian, codes, scale, zero)
    for _ in range(sweeps):
        codes, scale = descend(weight, hessian, codes, scale, zero, SCHEMES[scheme].bits, 1, 128)
        after = row_errors(weight, hessian, codes, scale, zero)
        assert (after <= before * (1 + 1e-12)).all()
        before = after


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), scheme=SCHEME)
def test_in_the_end_no_other_code_and_no_other_scale_is_better(seed, scheme):
    bits = SCHEMES[scheme].bits
    weight, hessian, (codes, scale, zero) = start(SCHEMES[scheme], seed)
    codes, scale = descend(weight, hessian, codes, scale, zero, bits, 50, 128)
    least = row_errors(weight, hessian, codes, scale, zero) * (1 - 1e-12)
    lowest, highest = code_range(bits, signed=zero is None)
    assert lowest <= codes.min()
    assert codes.max() <= highest
    for column in range(SIZE):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (other[:, column].int() + step).clamp(lowest, highest)
            assert (row_errors(weight, hessian, other, scale, zero) >= least).all()
    for group in range(scale.shape[1]):
        for step in (-1, 1):  # to the next number that bfloat16 has
            other = scale.clone()
            other[:, group] = (other[:, group].view(torch.int16) + step).view(torch.bfloat16)
            assert (row_errors(weight, hessian, codes, other, zero) >= least).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gptq_is_bettered_more_by_every_sweep(scheme, dtype):
    weight, hessian = problem(rows=64)
    errors = [
        gptq_round(weight.to(dtype), hessian, SCHEMES[scheme], GPTQOptions(damping=0, sweeps=sweeps)).error
        for sweeps in (0, 1, 4)
    ]
    assert errors[2] < errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_change_speed_and_not_results(scheme):
    weight, hessian, (codes, scale, zero) = start(SCHEMES[scheme])
    whole, *others = (
        descend(weight, hessian, codes, scale, zero, SCHEMES[scheme].bits, 3, size) for size in (100, 1, 7, 24)
    )
    for other in others:
        assert torch.equal(whole[0], other[0])
        assert torch.equal(whole[1], other[1])


def test_scales_of_independent_inputs_are_least_squares():
    weight, _, (codes, scale, _) = start(replace(SCHEMES["groups"], clip=0.5))
    found_codes, found = descend(weight, torch.eye(SIZE, dtype=weight.dtype), codes, scale, None, 4, 1, 128)
    assert torch.equal(found_codes, codes)
    rows, of_codes = weight.unflatten(1, (-1, 8)), codes.double().unflatten(1, (-1, 8))
    best = (rows * of_codes).sum(-1) / of_codes.square().sum(-1)
    assert torch.equal(found, best.bfloat16())


def test_a_row_of_zeros_stays_one():
    weight, hessian, (codes, scale, _) = start(SCHEMES["symmetric"])
    weight[2], codes[2], scale[2] = 0, 0, 1
    codes, scale = descend(weight, hessian, codes, scale, None, 4, 2, 128)
    assert not codes[2].any()
    assert scale[2] == 1
