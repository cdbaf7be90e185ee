"""Codes of a prompt are found by a reciprocal in two parts: here for every quotient that could become another code.

The kernel's instructions are repeated in exact arithmetic, since Triton's interpreter has no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

PRECISION = 24  # bits of float32
CLOSE = 44  # bits: the two parts hold a few more


def rounded(number: Fraction) -> Fraction:
    """Return the nearest float32, half to even."""
    if not number:
        return number
    size = abs(number)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (exponent - PRECISION + 1)
    return round(number / unit) * unit


def quotient(x: Fraction, step: Fraction) -> Fraction:
    """Return what the kernel takes for x / step."""
    reciprocal = rounded(1 / step)
    missing = rounded(1 - reciprocal * step)
    rest = rounded(rounded(missing * missing + missing) * reciprocal)
    return rounded(x * reciprocal + rounded(x * rest))


def close_to_a_boundary(bits: int, codes: int) -> Iterator[tuple[Fraction, Fraction]]:
    """Yield numbers of so many bits and steps whose quotient is next to where it is rounded to a tie of two codes.

    All others are further from a boundary than the kernel's quotient is from the exact one. Powers of two are left out:
    they change neither's bits.
    """
    numbers = np.arange(2 ** (bits - 1), 2**bits)
    for code in range(codes):
        tie = Fraction(2 * code + 1, 2)
        unit = rounded(tie * (1 + Fraction(1, 2 ** (PRECISION - 1)))) - tie
        below = unit / 2 if code == 0 else unit  # a half is a power of two
        for boundary in (tie + unit / 2, tie - below / 2):
            wide = boundary.numerator
            for shift in (wide.bit_length() + PRECISION - bits - 1, wide.bit_length() + PRECISION - bits):
                for up in (0, 1):
                    steps = (numbers << shift) // wide + up
                    is_close = np.abs((numbers << shift) - steps * wide) <= numbers << shift >> CLOSE
                    is_step = (steps >= 2 ** (PRECISION - 1)) & (steps < 2**PRECISION)
                    for index in np.flatnonzero(is_close & is_step):
                        yield Fraction(int(numbers[index]) << shift, boundary.denominator), Fraction(int(steps[index]))


@pytest.mark.parametrize("bits", [8, 11])  # of bfloat16 and of float16
def test_quotients_next_to_a_boundary_are_on_the_right_side(bits: int) -> None:
    cases = list(close_to_a_boundary(bits, codes=256))
    assert cases
    for x, step in cases:
        assert quotient(x, step) == rounded(x / step)
