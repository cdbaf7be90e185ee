"""Device functions that several kernels share. Each computes what ``quarot_fx.ops.affine`` defines, to the last bit.

Inline PTX is used where Triton would work byte by byte; the interpreter, which has no PTX, takes the plain branch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quarot_fx.ops.interleave_rows import ROWS

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # adding it leaves no bits for a fraction: rounds half to even
ROUND_TO_INTEGER_BITS = tl.constexpr(0x4B400000)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32
GATE_ROWS = tl.constexpr(ROWS)  # of a weight belong to a gate, then as many to what it multiplies


# -- packed codes ----------------------------------------------------------------------------------


@triton.jit
def low_codes_times_16(packed):
    """Return 16 q as int8 for the codes q in -8..7 that the low nibbles hold as q + 8."""
    if INTERPRETED:
        result = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 t, t, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return result


@triton.jit
def high_codes_times_16(packed):
    """Return 16 q as int8 for the codes q in -8..7 that the high nibbles hold as q + 8."""
    if INTERPRETED:
        result = ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $1, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return result


@triton.jit
def low_nibbles(packed):
    """Return the low nibbles, 0 to 15, as int8."""
    if INTERPRETED:
        result = (packed & 0x0F).to(tl.int8, bitcast=True)
    else:
        result = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return result


@triton.jit
def high_nibbles(packed):
    """Return the high nibbles, 0 to 15, as int8."""
    if INTERPRETED:
        result = (packed >> 4).to(tl.int8, bitcast=True)
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return result


def _words_to_floats(bits: int, upper: int) -> str:
    """Return PTX that makes 16-bit floats of the codes in two words: the last bits of what has these upper bits.

    Equal halves of both words are put side by side, so that two codes take one shift, and one ``lop3`` that masks them
    and sets the upper bits. A register holds the same code of both.
    """
    count = 32 // bits
    mask, uppers = (2**bits - 1) * 0x00010001, upper * 0x00010001
    lines = [f"prmt.b32 halves, ${count}, ${count + 1}, 0x5410;"]
    for code in range(count):
        if code == count // 2:
            lines.append(f"prmt.b32 halves, ${count}, ${count + 1}, 0x7632;")
        lines.append(f"shr.u32 shifted, halves, {bits * code % 16};")
        lines.append(f"lop3.b32 ${code}, shifted, {mask:#x}, {uppers:#x}, 0xEA;")  # (a & b) | c
    return f"{{ .reg .b32 halves, shifted; {' '.join(lines)} }}"


def _bytes_to_bfloat16() -> str:
    """Return PTX for codes of 8 bits, all that a bfloat16 has: they are made the last bits of 2^23 in float32 first."""
    lines = []
    for code in range(4):
        for name, word in (("low", "$4"), ("high", "$5")):
            lines.append(f"prmt.b32 bits, {word}, 0x4B000000, {0x7540 | code:#x}; mov.b32 {name}, bits;")
            lines.append(f"sub.f32 {name}, {name}, 0f4B000000;")
        lines.append(f"cvt.rn.bf16x2.f32 ${code}, high, low;")
    return f"{{ .reg .b32 bits; .reg .f32 low, high; {' '.join(lines)} }}"


def _registers(count: int) -> str:
    return ",".join(["=&r"] * count + ["r", "r"])


BFLOAT16_OFFSET = tl.constexpr(128)  # 0x4300, whose last bit stands for 1
FLOAT16_OFFSET = tl.constexpr(1024)  # 0x6400, likewise
CODES_2_AS_BFLOAT16 = tl.constexpr(_words_to_floats(2, 0x4300))
CODES_2_AS_FLOAT16 = tl.constexpr(_words_to_floats(2, 0x6400))
CODES_4_AS_BFLOAT16 = tl.constexpr(_words_to_floats(4, 0x4300))
CODES_4_AS_FLOAT16 = tl.constexpr(_words_to_floats(4, 0x6400))
CODES_8_AS_BFLOAT16 = tl.constexpr(_bytes_to_bfloat16())
CODES_8_AS_FLOAT16 = tl.constexpr(_words_to_floats(8, 0x6400))
REGISTERS_2, REGISTERS_4, REGISTERS_8 = (tl.constexpr(_registers(count)) for count in (16, 8, 4))
BFLOAT16S_2, BFLOAT16S_4, BFLOAT16S_8 = (tl.constexpr((tl.bfloat16,) * count) for count in (16, 8, 4))
FLOAT16S_2, FLOAT16S_4, FLOAT16S_8 = (tl.constexpr((tl.float16,) * count) for count in (16, 8, 4))


@triton.jit
def code_offset(BITS: tl.constexpr, dtype: tl.constexpr):
    """Return what ``codes_as_floats`` adds to codes."""
    of_bfloat16: tl.constexpr = BFLOAT16_OFFSET if dtype == tl.bfloat16 and BITS < 8 else 0
    offset: tl.constexpr = FLOAT16_OFFSET if dtype == tl.float16 else of_bfloat16
    return offset


@triton.jit
def code_at(place, BITS: tl.constexpr):
    """Return which code of a packed row is at a place of what ``codes_as_floats`` returns."""
    COUNT: tl.constexpr = 64 // BITS  # in two words
    return place // COUNT * COUNT + place % COUNT // 2 + place % 2 * (COUNT // 2)


@triton.jit
def codes_as_floats(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of 2, 4 or 8 bits in int32 words [rows, words], plus ``code_offset``, as floats that are exact.

    The result is [rows, 32 / BITS * words]; ``code_at`` says which code is where.
    """
    IS_PLAIN: tl.constexpr = INTERPRETED or dtype == tl.float32
    is_bfloat16: tl.constexpr = dtype == tl.bfloat16
    if BITS == 8:
        if IS_PLAIN:
            a, b, c, d = words, words >> 8, words >> 16, words >> 24
        else:
            asm8: tl.constexpr = CODES_8_AS_BFLOAT16 if is_bfloat16 else CODES_8_AS_FLOAT16
            types8: tl.constexpr = BFLOAT16S_8 if is_bfloat16 else FLOAT16S_8
            a, b, c, d = tl.inline_asm_elementwise(asm8, REGISTERS_8, [words], dtype=types8, is_pure=True, pack=2)
        codes = _joined4(a, b, c, d)
    elif BITS == 4:
        if IS_PLAIN:
            a, b, c, d = words, words >> 4, words >> 8, words >> 12
            e, f, g, h = words >> 16, words >> 20, words >> 24, words >> 28
        else:
            asm4: tl.constexpr = CODES_4_AS_BFLOAT16 if is_bfloat16 else CODES_4_AS_FLOAT16
            types4: tl.constexpr = BFLOAT16S_4 if is_bfloat16 else FLOAT16S_4
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                asm4, REGISTERS_4, [words], dtype=types4, is_pure=True, pack=2
            )
        codes = _joined8(a, b, c, d, e, f, g, h)
    else:
        if IS_PLAIN:
            a, b, c, d = words, words >> 2, words >> 4, words >> 6
            e, f, g, h = words >> 8, words >> 10, words >> 12, words >> 14
            i, j, k, m = words >> 16, words >> 18, words >> 20, words >> 22
            n, o, p, q = words >> 24, words >> 26, words >> 28, words >> 30
        else:
            asm2: tl.constexpr = CODES_2_AS_BFLOAT16 if is_bfloat16 else CODES_2_AS_FLOAT16
            types2: tl.constexpr = BFLOAT16S_2 if is_bfloat16 else FLOAT16S_2
            a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = tl.inline_asm_elementwise(
                asm2, REGISTERS_2, [words], dtype=types2, is_pure=True, pack=2
            )
        codes = tl.join(_joined8(a, c, e, g, i, k, n, p), _joined8(b, d, f, h, j, m, o, q))
    COUNT: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = words.shape[1]
    codes = tl.permute(tl.reshape(codes, (words.shape[0], WORDS // 2, 2, COUNT)), (0, 1, 3, 2))
    codes = tl.reshape(codes, (words.shape[0], COUNT * WORDS))
    if IS_PLAIN:
        offset: tl.constexpr = code_offset(BITS, dtype)
        codes = round_to((codes & (2**BITS - 1)).to(tl.float32) + offset, dtype)
    return codes


@triton.jit
def _joined4(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _joined8(a, b, c, d, e, f, g, h):
    return tl.join(_joined4(a, c, e, g), _joined4(b, d, f, h))


@triton.jit
def _signed_byte(word, SHIFT: tl.constexpr):
    return (((word >> SHIFT) & 0xFF) ^ 0x80) - 0x80


@triton.jit
def dot4(a, b, accumulator):
    """Return accumulator + the product of four signed bytes of a with four of b; all are int32."""
    if INTERPRETED:
        for shift in tl.static_range(0, 32, 8):
            accumulator += _signed_byte(a, shift) * _signed_byte(b, shift)
    else:
        accumulator = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, accumulator], dtype=tl.int32, is_pure=True, pack=1
        )
    return accumulator


# -- rounding --------------------------------------------------------------------------------------


@triton.jit
def divide_scalars(x, y):
    """Return x / y for float32, correctly rounded, unlike ``/``."""
    return x / y if INTERPRETED else tl.math.div_rn(x, y)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to a floating-point type, half to even; the interpreter's own cast to bfloat16 cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return the float32 product of two matrices of one floating-point type."""
    if INTERPRETED:  # it holds bfloat16 as integers, and multiplies these
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _quotient(x, y):
    """Return x / y up to 2 units in the last place, which takes a third of the instructions of ``/``."""
    return x / y if INTERPRETED else libdevice.fast_dividef(x, y)


@triton.jit
def keep(x):
    """Return x, 16 bits an element; the compiler will not compute it again in another layout."""
    if INTERPRETED:
        result = x
    else:
        result = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return result


@triton.jit
def _sigmoid(x, dtype: tl.constexpr):
    """Return 1 / (1 + exp(-x)); for a result of 16 bits by one special instruction, up to 2^-12, instead of by two."""
    if INTERPRETED or dtype == tl.float32:
        y = _quotient(1.0, 1 + tl.exp(-x))
    else:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        y = tl.fma(tanh, 0.5, 0.5)
    return y


@triton.jit
def activate(x, NAME: tl.constexpr, dtype: tl.constexpr):
    """Apply an activation of ``quarot_fx.ops.activations.ACTIVATIONS`` to float32, for a result of a dtype."""
    tl.static_assert(
        NAME == "silu"
        or NAME == "sigmoid"
        or NAME == "relu"
        or NAME == "relu_squared"
        or NAME == "gelu"
        or NAME == "gelu_tanh"
        or NAME == "identity",
        "a kernel lacks this activation",
    )
    if NAME == "silu":
        y = x * _sigmoid(x, dtype)
    elif NAME == "sigmoid":
        y = _sigmoid(x, dtype)
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    elif NAME == "relu_squared":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "identity":
        y = x
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    else:
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), dtype)  # 1 + tanh(u) = 2 sigmoid(2u)
    return y


@triton.jit
def load_activated(x_at, gate_at, mask, ACTIVATION: tl.constexpr):
    """Load activation(gate) * x, or activation(x) where there is no gate, rounded to the type of x."""
    dtype: tl.constexpr = x_at.dtype.element_ty
    values = tl.load(x_at, mask=mask, other=0)
    if gate_at is not None:
        gates = tl.load(gate_at, mask=mask, other=0).to(tl.float32)
        values = round_to(activate(gates, ACTIVATION, dtype) * values.to(tl.float32), dtype)
    elif ACTIVATION != "identity":
        values = round_to(activate(values.to(tl.float32), ACTIVATION, dtype), dtype)
    if (gate_at is not None or ACTIVATION != "identity") and dtype != tl.float32:
        values = keep(values)
    return values


# -- loops -----------------------------------------------------------------------------------------


@triton.jit
def rounds(count):
    """Return a number that is not known before a kernel runs as ``range`` takes it; the interpreter's is an array."""
    return count.handle.data.item() if INTERPRETED else count


# -- a kernel's place in a stream ------------------------------------------------------------------


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait, in a kernel that was started early, for the results of the kernels before it."""
    if EARLY and not INTERPRETED:
        gdc_wait()


@triton.jit
def let_dependents_start(EARLY: tl.constexpr):
    """Allow the next kernel to be started early; what it reads of this one, it waits for."""
    if EARLY and not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers, EARLY: tl.constexpr):
    """Start to move the lines of 128 bytes at these pointers to the L2 cache, before the wait for inputs.

    Caches of level 2 are coherent, so that this is safe also where the kernel ahead still writes these lines.
    """
    if EARLY and not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# -- quantisation ----------------------------------------------------------------------------------


@triton.jit
def _maximum_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rows_of_groups(values):
    """View [groups, A, B] as [groups, A * B] for a reduction; the order within a group may be any."""
    # One group is a whole tile: its elements are reduced where they are, in registers first.
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]), can_reorder=values.shape[0] == 1)


@triton.jit
def _largest_magnitude(values):
    """Return max|x| of each group of [groups, elements]; a NaN wins."""
    if INTERPRETED:  # bits of floats are ordered like |x|, with NaN above infinity; any other reduction would be slow
        magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    else:
        largest = tl.reduce(tl.abs(values), 1, _maximum_or_nan)
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
    """Return ROUND_TO_INTEGER + an integer plus an integer origin, clamped; a NaN becomes the lowest."""
    if origin is not None:
        shifted += origin
    if INTERPRETED:  # a GPU's maximum drops a NaN, numpy's does not
        shifted = tl.where(shifted == shifted, shifted, ROUND_TO_INTEGER + lowest)
    return tl.minimum(tl.maximum(shifted, ROUND_TO_INTEGER + lowest), ROUND_TO_INTEGER + highest)


@triton.jit
def quantization(rows, clip, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """Return the step, the zero point, and the lowest and the highest code of each group of float32 [groups, n].

    All are float32. A group with a value that is not finite has one code only.
    """
    HIGHEST: tl.constexpr = 2.0 ** (BITS - 1) - 1
    LOWEST: tl.constexpr = -HIGHEST - 1
    CODE_OF_NAN: tl.constexpr = 0.0 if SYMMETRIC else LOWEST
    largest = _largest_magnitude(rows)
    is_finite = largest < float("inf")
    if SYMMETRIC:
        step = divide_scalars(largest * clip, HIGHEST)
        step = tl.where(step == 0, 1.0, step)
        zeros = tl.zeros_like(step)
    else:
        low = tl.minimum(tl.min(rows, axis=1), 0.0) * clip
        high = tl.maximum(tl.max(rows, axis=1), 0.0) * clip
        step = divide_scalars(high - low, 2 * HIGHEST + 1)
        step = tl.where(is_finite, tl.where(step == 0, 1.0, step), largest)  # of NaNs only, low and high may be 0
        zeros = _round_to_code(-low, divide_scalars(1.0, step), LOWEST, LOWEST, HIGHEST) - ROUND_TO_INTEGER
        zeros = tl.where(is_finite, zeros, CODE_OF_NAN)
    return step, zeros, tl.where(is_finite, LOWEST, CODE_OF_NAN), tl.where(is_finite, HIGHEST, CODE_OF_NAN)


@triton.jit
def store_codes(values, codes_at, mask, step, zeros, lowest, highest, size, SYMMETRIC: tl.constexpr):
    """Store the codes of float32 [groups, A, B] and return sums over ``size`` elements each; the rest must be 0."""
    origin = None if SYMMETRIC else zeros[:, None, None]
    reciprocal = divide_scalars(1.0, step)[:, None, None]
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


@triton.jit
def store_quantized(values, codes_at, mask, scale, zero, sums, groups, is_group, size, clip, BITS: tl.constexpr):
    """Quantise float32 [groups, A, B], A x B elements a group, and store codes, scale, zero point and sum of codes.

    ``quarot::quantize_activation`` defines the numbers, but for quotients at a tie between two codes: here they are
    products with the scale's reciprocal. A group has ``size`` elements; masked ones must be 0, which is in any range.
    """
    SYMMETRIC: tl.constexpr = zero is None
    step, zeros, lowest, highest = quantization(rows_of_groups(values), clip, SYMMETRIC, BITS)
    total = store_codes(values, codes_at, mask, step, zeros, lowest, highest, size, SYMMETRIC)
    tl.store(scale + groups, step, mask=is_group)
    tl.store(sums + groups, total, mask=is_group)
    if not SYMMETRIC:
        tl.store(zero + groups, zeros.to(tl.int32), mask=is_group)


@triton.jit
def _maximum(rows):
    """Return the maximum of each row of [rows, elements]; a NaN wins."""
    if INTERPRETED:
        magnitude = _largest_magnitude(rows)
        largest = tl.where(magnitude == magnitude, tl.max(rows, axis=1), magnitude)
    else:
        largest = tl.reduce(rows, 1, _maximum_or_nan)
    return largest


@triton.jit
def encode_asymmetric(rows, clip, BITS: tl.constexpr):
    """Return codes of float32 [rows, elements], and a scale and a zero point for each row, all float32.

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
    codes = _clamped(quotients + ROUND_TO_INTEGER, zero[:, None], 0.0, highest[:, None]) - ROUND_TO_INTEGER
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
