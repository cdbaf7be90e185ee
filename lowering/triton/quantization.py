"""Device functions that quantise. Each computes what ``quarot_fx.ops.affine`` defines, to the last bit."""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.language import INTERPRETED, divide_scalars
from quarot_fx.lowering.triton.packed_codes import words_of_low_bytes

ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # adding it leaves no bits for a fraction: rounds half to even
ROUND_TO_INTEGER_BITS = tl.constexpr(0x4B400000)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32


@triton.jit
def maximum_or_nan(a, b):
    """Return the maximum; a NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger_magnitude(a, b):
    """Return the larger of |a| and |b| by one instruction; the compiler might take another two for magnitudes."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 x, y; abs.f32 x, $1; abs.f32 y, $2; max.NaN.f32 $0, x, y; }", "=f,f,f",
        [a, b], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def rows_of_groups(values):
    """View [groups, A, B] as [groups, A * B] for a reduction, which leaves elements where they are."""
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]))


@triton.jit
def largest_magnitude(values):
    """Return max|x| of each group of [groups, elements]; a NaN wins."""
    if INTERPRETED:  # bits of floats are ordered like |x|, with NaN above infinity; any other reduction would be slow
        magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    else:
        largest = tl.abs(tl.reduce(values, 1, _larger_magnitude))
    return largest


@triton.jit
def _round_to_code(values, reciprocal, origin, lowest, highest):
    """Return values * reciprocal, rounded half to even, plus an integer origin, clamped: as ROUND_TO_INTEGER + code.

    The last bits of such a float32 are the code in two's complement. A NaN becomes the lowest code.
    """
    return _clamped(tl.fma(values, reciprocal, ROUND_TO_INTEGER), origin, lowest, highest)


@triton.jit
def low_byte(integers):
    """Return the last 8 bits of integers in float32 as uint8, without a conversion."""
    return (integers + ROUND_TO_INTEGER).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _clamped(shifted, origin, lowest, highest):
    """Return ROUND_TO_INTEGER + an integer plus an integer origin, clamped; a NaN becomes the lowest, if any."""
    if origin is not None:
        shifted += origin
    if lowest is not None:
        if INTERPRETED:  # a GPU's maximum drops a NaN, numpy's does not
            shifted = tl.where(shifted == shifted, shifted, ROUND_TO_INTEGER + lowest)
        shifted = tl.maximum(shifted, ROUND_TO_INTEGER + lowest)
    return tl.minimum(shifted, ROUND_TO_INTEGER + highest)


@triton.jit
def symmetric_step(largest, unit, clip, BITS: tl.constexpr):
    """Return the step of symmetric codes of numbers, in units of ``unit``, of which this magnitude is the largest."""
    step = divide_scalars(largest * unit * clip, 2.0 ** (BITS - 1) - 1)
    return tl.where(step == 0, 1.0, step)


@triton.jit
def quantization(rows, unit, clip, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """Return the step, the zero point, and the lowest and the highest code of each group of float32 [groups, n].

    All are float32, of numbers in units of ``unit``: to scale these would cost more. A group with a value that is not
    finite has one code only.
    """
    largest = largest_magnitude(rows)
    if SYMMETRIC:
        low, high = largest, largest
    else:
        low, high = tl.min(rows, axis=1), tl.max(rows, axis=1)
    return quantization_of_range(largest, low, high, unit, clip, SYMMETRIC, BITS)


@triton.jit
def quantization_of_range(largest, low, high, unit, clip, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """Return the same for known ranges. A NaN need be in the largest magnitude only."""
    HIGHEST: tl.constexpr = 2.0 ** (BITS - 1) - 1
    LOWEST: tl.constexpr = -HIGHEST - 1
    CODE_OF_NAN: tl.constexpr = 0.0 if SYMMETRIC else LOWEST
    is_finite = largest < float("inf")
    if SYMMETRIC:
        step = symmetric_step(largest, unit, clip, BITS)
        zeros = 0.0
    else:
        low = tl.minimum(low, 0.0) * unit * clip
        high = tl.maximum(high, 0.0) * unit * clip
        step = divide_scalars(high - low, 2 * HIGHEST + 1)
        step = tl.where(is_finite, tl.where(step == 0, 1.0, step), largest)  # of NaNs only, low and high may be 0
        zeros = _round_to_code(-low, divide_scalars(1.0, step), LOWEST, LOWEST, HIGHEST) - ROUND_TO_INTEGER
    zeros = tl.where(is_finite, zeros, CODE_OF_NAN)
    return step, zeros, tl.where(is_finite, LOWEST, CODE_OF_NAN), tl.where(is_finite, HIGHEST, CODE_OF_NAN)


@triton.jit
def store_codes(values, unit, codes_at, mask, step, zeros, lowest, highest, size, SYMMETRIC: tl.constexpr):
    """Store the codes of float32 [groups, A, B] and return sums over ``size`` elements each; the rest must be 0."""
    origin = None if SYMMETRIC else zeros[:, None, None]
    reciprocal = (divide_scalars(1.0, step) * unit)[:, None, None]
    shifted = _round_to_code(values, reciprocal, origin, lowest[:, None, None], highest[:, None, None])
    bits = shifted.to(tl.int32, bitcast=True)
    if codes_at.dtype.element_ty == tl.int8:
        codes = bits.to(tl.int8)
    else:
        codes = (shifted - ROUND_TO_INTEGER).to(codes_at.dtype.element_ty)
    tl.store(codes_at, codes, mask=mask)
    total = tl.sum(rows_of_groups(bits - ROUND_TO_INTEGER_BITS), axis=1)
    if not SYMMETRIC:
        total -= (values.shape[1] * values.shape[2] - size) * zeros.to(tl.int32)
    return total


def reaches_below(bits: int, clip: float) -> bool:
    """Whether numbers whose range is clipped may round to less than the lowest symmetric code."""
    return bool((2 ** (bits - 1) - 1) / clip > 2 ** (bits - 1) + 0.25)  # 0.5, less what float32 rounds


@triton.jit
def packed_words(values, unit, step, BITS: tl.constexpr, REACHES_BELOW: tl.constexpr):
    """Return symmetric codes of float32 [words, 4], four of 8 bits in each word, int32."""
    HIGHEST: tl.constexpr = 2.0 ** (BITS - 1) - 1
    LOWEST: tl.constexpr = -HIGHEST - 1 if REACHES_BELOW else None
    shifted = _round_to_code(values, divide_scalars(1.0, step) * unit, None, LOWEST, HIGHEST)
    return words_of_low_bytes(shifted.to(tl.int32, bitcast=True))


@triton.jit
def store_quantized(values, unit, codes_at, mask, scale, zero, sums, groups, is_group, size, clip, BITS: tl.constexpr):
    """Quantise float32 [groups, A, B], A x B elements a group, and store codes, scale, zero point and sum of codes.

    ``quarot::quantize_activation`` defines the numbers, but for quotients at a tie between two codes: here they are
    products with the scale's reciprocal. Values are in units of ``unit``. A group has ``size`` elements; masked ones
    must be 0, which is in any range.
    """
    SYMMETRIC: tl.constexpr = zero is None
    step, zeros, lowest, highest = quantization(rows_of_groups(values), unit, clip, SYMMETRIC, BITS)
    total = store_codes(values, unit, codes_at, mask, step, zeros, lowest, highest, size, SYMMETRIC)
    tl.store(scale + groups, step, mask=is_group)
    tl.store(sums + groups, total, mask=is_group)
    if not SYMMETRIC:
        tl.store(zero + groups, zeros.to(tl.int32), mask=is_group)


@triton.jit
def _maximum(rows):
    """Return the maximum of each row of [rows, elements]; a NaN wins."""
    if INTERPRETED:
        magnitude = largest_magnitude(rows)
        largest = tl.where(magnitude == magnitude, tl.max(rows, axis=1), magnitude)
    else:
        largest = tl.reduce(rows, 1, maximum_or_nan)
    return largest


@triton.jit
def encode_asymmetric(rows, clip, BITS: tl.constexpr):
    """Return codes of float32 [rows, elements] less a zero point, and a scale and the zero point of each row.

    All are float32; the codes are still ``ROUND_TO_INTEGER`` too large, so that their last bits are integers.

    ``quarot::quantize_asymmetric`` defines the numbers, and these are the same, if products and sums are not contracted
    and scales are normal numbers. Masked elements must be 0, which is in any range.
    """
    HIGHEST: tl.constexpr = 2.0**BITS - 1
    low = tl.minimum(tl.min(rows, axis=1), 0.0) * clip
    high = tl.maximum(_maximum(rows), 0.0, propagate_nan=tl.PropagateNan.ALL) * clip
    step = divide_scalars(high - low, HIGHEST)
    step = tl.where(step == 0, 1.0, step)
    highest = tl.where(step < float("inf"), HIGHEST, 0.0)  # a row with a value that is not finite has one code only
    zero = _clamped(divide_scalars(-low, step) + ROUND_TO_INTEGER, None, 0.0, highest) - ROUND_TO_INTEGER
    quotients = _divide_rows(rows, step)
    codes = _clamped(quotients + ROUND_TO_INTEGER, None, -zero[:, None], (highest - zero)[:, None])
    return codes, step, zero


@triton.jit
def _divide_rows(rows, divisors):
    """Return each row over its divisor, correctly rounded (Markstein): a tenth of the instructions of a division."""
    if INTERPRETED:  # its fma rounds twice
        quotients = rows / divisors[:, None]
    else:
        reciprocals = tl.minimum(divide_scalars(1.0, divisors), LARGEST)[:, None]  # finite for any divisor
        quotients = rows * reciprocals
        rest = tl.fma(-quotients, tl.broadcast_to(divisors[:, None], rows.shape), rows)
        quotients = tl.fma(rest, tl.broadcast_to(reciprocals, rows.shape), quotients)
    return quotients
