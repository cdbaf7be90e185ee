"""Device functions that turn packed codes into numbers that are multiplied.

Inline PTX is used where Triton would work byte by byte; the interpreter, which has no PTX, takes the plain branch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quarot_fx.lowering.triton.language import INTERPRETED, round_to


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
