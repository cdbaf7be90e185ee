"""Device functions on pairs: two neighbours of 16 bits in a word of 32, which one instruction takes together.

Only ranges and codes of rows are found in pairs; what lies between is float32. Requires Hopper or later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.language import INTERPRETED, round_to
from quarot_fx.lowering.triton.quantization import ROUND_TO_INTEGER_BITS

# -- floating-point numbers ------------------------------------------------------------------------


@triton.jit
def pairs_of(even, odd):
    """Return numbers of 16 bits and their neighbours as pairs, int32."""
    even, odd = even.to(tl.uint16, bitcast=True).to(tl.uint32), odd.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (even | (odd << 16)).to(tl.int32, bitcast=True)


@triton.jit
def rounded_pairs(even, odd, dtype: tl.constexpr):
    """Round float32 and their neighbours to a type of 16 bits, as pairs: one instruction for a pair."""
    if INTERPRETED:
        pairs = pairs_of(round_to(even, dtype), round_to(odd, dtype))
    elif dtype == tl.bfloat16:
        pairs = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        pairs = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.int32, is_pure=False, pack=1
        )
    return pairs


@triton.jit
def even_of(pairs, dtype: tl.constexpr):
    """Return the first of each pair of a type of 16 bits as float32."""
    if dtype == tl.bfloat16:
        number = (pairs << 16).to(tl.float32, bitcast=True)
    else:
        number = pairs.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return number


@triton.jit
def odd_of(pairs, dtype: tl.constexpr):
    """Return the second of each pair of a type of 16 bits as float32."""
    if dtype == tl.bfloat16:
        number = (pairs & -0x10000).to(tl.float32, bitcast=True)
    else:
        number = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return number


@triton.jit
def range_of_rows(pairs, dtype: tl.constexpr):
    """Return the minimum, which may pass over NaNs, and the maximum, where a NaN wins, of each row of pairs."""
    if INTERPRETED:  # bits of floats are ordered like |x|, with NaN above infinity; any other reduction would be slow
        numbers = tl.join(even_of(pairs, dtype), odd_of(pairs, dtype))
        numbers = tl.reshape(numbers, (pairs.shape[0], 2 * pairs.shape[1]))
        largest = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
        low, high = tl.min(numbers, axis=1), tl.where(largest == largest, tl.max(numbers, axis=1), largest)
    else:
        if dtype == tl.bfloat16:
            low, high = tl.reduce(pairs, 1, _minimum_bfloat16), tl.reduce(pairs, 1, _maximum_bfloat16)
        else:
            low, high = tl.reduce(pairs, 1, _minimum_float16), tl.reduce(pairs, 1, _maximum_float16)
        low = tl.minimum(even_of(low, dtype), odd_of(low, dtype))
        high = tl.maximum(even_of(high, dtype), odd_of(high, dtype), propagate_nan=tl.PropagateNan.ALL)
    return low, high


@triton.jit
def _minimum_bfloat16(a, b):
    return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _maximum_bfloat16(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _minimum_float16(a, b):
    return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _maximum_float16(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


# -- integers --------------------------------------------------------------------------------------


@triton.jit
def twice(number):
    """Return small integers in float32 as pairs of themselves."""
    return number.to(tl.int32) * 0x10001


@triton.jit
def last_halves(a, b):
    """Return the last 16 bits of each as a pair."""
    if INTERPRETED:
        pairs = (a & 0xFFFF) | (b << 16)
    else:
        pairs = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return pairs


@triton.jit
def added_and_clamped(pairs, addend, highest):
    """Return signed integers plus others, clamped to 0 and the highest: one instruction for a pair."""
    if INTERPRETED:
        addend, highest = addend & 0xFFFF, highest & 0xFFFF
        first = tl.minimum(tl.maximum(((pairs << 16) >> 16) + addend, 0), highest)
        second = tl.minimum(tl.maximum((pairs >> 16) + addend, 0), highest)
        clamped = last_halves(first, second)
    else:
        clamped = tl.inline_asm_elementwise(
            "{ .reg .b32 sum; add.s16x2 sum, $1, $2; min.s16x2.relu $0, sum, $3; }", "=r,r,r,r",
            [pairs, tl.broadcast_to(addend, pairs.shape), tl.broadcast_to(highest, pairs.shape)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return clamped


@triton.jit
def clamped(pairs, lowest, highest):
    """Return signed integers, clamped to bounds in float32: one instruction for a pair and each bound."""
    lowest, highest = lowest.to(tl.int32), highest.to(tl.int32)
    if INTERPRETED:
        first = tl.minimum(tl.maximum((pairs << 16) >> 16, lowest), highest)
        second = tl.minimum(tl.maximum(pairs >> 16, lowest), highest)
        numbers = last_halves(first, second)
    else:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b32 larger; max.s16x2 larger, $1, $2; min.s16x2 $0, larger, $3; }", "=r,r,r,r",
            [pairs, last_halves(lowest, lowest), last_halves(highest, highest)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return numbers


@triton.jit
def last_bytes(pairs, others):
    """Return the last 8 bits of two pairs as a word."""
    if INTERPRETED:
        word = (pairs & 0xFF) | ((pairs >> 8) & 0xFF00) | ((others & 0xFF) << 16) | ((others << 8) & -0x1000000)
    else:
        word = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [pairs, others], dtype=tl.int32, is_pure=True, pack=1
        )
    return word


@triton.jit
def sum_of_bytes(words):
    """Return the sum of the four signed integers of each word."""
    if INTERPRETED:
        total = ((words << 24) >> 24) + ((words << 16) >> 24) + ((words << 8) >> 24) + (words >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, 0x01010101, 0;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def with_magic_number(pairs, SECOND: tl.constexpr):
    """Return ROUND_TO_INTEGER plus the first or the second of each pair of codes, as float32."""
    if INTERPRETED:
        bits = ROUND_TO_INTEGER_BITS | (pairs >> 16 if SECOND else pairs & 0xFFFF)
    elif SECOND:
        bits = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4B400000, 0x7632;", "=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4B400000, 0x7610;", "=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=1
        )
    return bits.to(tl.float32, bitcast=True)
