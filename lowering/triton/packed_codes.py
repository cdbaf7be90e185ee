"""Device functions that turn packed codes into numbers that are multiplied.

Inline PTX is used where Triton would work byte by byte; the interpreter, which has no PTX, takes the plain branch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import constexpr_function

from quarot_fx.lowering.triton.language import INTERPRETED, round_to


@triton.jit
def low_codes_times_16(packed):
    """Return 16 q as int8 for the codes q in -8..7 that the low nibbles hold as q + 8."""
    if INTERPRETED:
        result = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }",  # (a & b) ^ c
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
            "lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;",  # (a & b) ^ c
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


BFLOAT16_OFFSET = tl.constexpr(128)  # 0x4300, whose last bit stands for 1


@constexpr_function
def _neighbours_to_floats(bits, dtype):
    """Return PTX that makes 16-bit floats of the codes in two words; a register holds the same code of both.

    Equal halves of both words are put side by side, so that two codes take one shift, and one ``lop3`` that masks them
    and sets the upper bits.
    """
    count = 32 // bits
    if bits == 8 and dtype == tl.bfloat16:
        return _bytes_to_bfloat16([(word, byte) for byte in range(4) for word in range(2)])
    lines = [f"prmt.b32 halves, ${count}, ${count + 1}, 0x5410;"]
    for code in range(count):
        if code == count // 2:
            lines.append(f"prmt.b32 halves, ${count}, ${count + 1}, 0x7632;")
        lines += _two_codes_to_floats(code, "halves", code % (count // 2), bits, dtype)
    return f"{{ .reg .b32 halves, shifted; {' '.join(lines)} }}"


@constexpr_function
def _halves_to_floats(bits, dtype):
    """Return PTX that makes 16-bit floats of the codes in two words; a register holds one code of each half of one."""
    count = 32 // bits
    if bits == 8 and dtype == tl.bfloat16:
        return _bytes_to_bfloat16([(word, byte) for word in range(2) for byte in (0, 2, 1, 3)])
    lines = []
    for word in range(2):
        for code in range(count // 2):
            lines += _two_codes_to_floats(word * count // 2 + code, f"${count + word}", code, bits, dtype)
    return f"{{ .reg .b32 shifted; {' '.join(lines)} }}"


@constexpr_function
def _two_codes_to_floats(result, halves, code, bits, dtype):
    """Return PTX for a code of each half of a word: bits of the significand of what is ``code_offset`` without them.

    They are its last bits in bfloat16, which takes one shift less, and its first ones in float16, whose significand has
    more: the smaller an offset, the less of a float32 is lost where it is taken off.
    """
    place = 0 if dtype == tl.bfloat16 else 10 - bits
    mask = ((2**bits - 1) << place) * 0x00010001
    uppers = (0x4300 if dtype == tl.bfloat16 else (15 + bits) << 10) * 0x00010001
    shift = bits * code - place
    return [
        f"shr.u32 shifted, {halves}, {shift};" if shift >= 0 else f"shl.b32 shifted, {halves}, {-shift};",
        f"lop3.b32 ${result}, shifted, {mask:#x}, {uppers:#x}, 0xEA;",  # (a & b) | c
    ]


@constexpr_function
def _bytes_to_bfloat16(places):
    """Return PTX for codes of 8 bits, all that a bfloat16 has: they are made the last bits of 2^23 in float32 first.

    Places are those of codes, of which two in turn share a register: a word and a byte of it.
    """
    lines: list[str] = []
    for place in places:
        half = "high" if len(lines) % 2 else "low"
        lines.append(
            f"prmt.b32 bits, ${4 + place[0]}, 0x4B000000, {0x7540 | place[1]:#x}; mov.b32 {half}, bits; "
            f"sub.f32 {half}, {half}, 0f4B000000;"
        )
    pairs = [f"{lines[i]} {lines[i + 1]} cvt.rn.bf16x2.f32 ${i // 2}, high, low;" for i in range(0, len(lines), 2)]
    return f"{{ .reg .b32 bits; .reg .f32 low, high; {' '.join(pairs)} }}"


@constexpr_function
def _registers(count):
    return ",".join(["=&r"] * count + ["r", "r"])


@constexpr_function
def _repeated(dtype, count):
    return (dtype,) * count


@triton.jit
def code_offset(BITS: tl.constexpr, dtype: tl.constexpr):
    """Return what is added to codes when they are made floats."""
    of_bfloat16: tl.constexpr = BFLOAT16_OFFSET if dtype == tl.bfloat16 and BITS < 8 else 0
    offset: tl.constexpr = 2**BITS if dtype == tl.float16 else of_bfloat16
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
    COUNT: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = words.shape[1]
    codes = neighbours_as_floats(words, BITS, dtype)
    codes = tl.permute(tl.reshape(codes, (words.shape[0], WORDS // 2, 2, COUNT)), (0, 1, 3, 2))
    return tl.reshape(codes, (words.shape[0], COUNT * WORDS))


@triton.jit
def neighbours_as_floats(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of 2, 4 or 8 bits in int32 words, plus ``code_offset``, as floats that are exact.

    The result has the codes of a word along axes of two that are added at the end. A thread's neighbouring words are
    best those whose codes are wanted in one register.
    """
    if INTERPRETED or dtype == tl.float32:
        codes = _plain_codes(words, BITS, dtype)
    else:
        codes = _floats(words, _neighbours_to_floats(BITS, dtype), BITS, dtype)
    return codes


@triton.jit
def halves_as_floats(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the same codes for int32 words [A, B, words], in another order: two of one word share a register.

    Place ``2 m + p`` of words and ``q n + i`` of codes has code ``p n + i`` of word ``2 m + q``, where n = 16 / BITS.
    """
    if INTERPRETED:
        codes = _plain_codes(words, BITS, dtype)
        SPLIT: tl.constexpr = (words.shape[0], words.shape[1], words.shape[2] // 2, 2, 2, 16 // BITS)
        codes = tl.permute(tl.reshape(codes, SPLIT), (0, 1, 2, 4, 3, 5))
    else:
        codes = _floats(words, _halves_to_floats(BITS, dtype), BITS, dtype)
    return codes


@triton.jit
def _floats(words, ASSEMBLY: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return what PTX makes of two neighbouring words, along axes of two that are added at the end."""
    registers: tl.constexpr = _registers(32 // BITS)
    types: tl.constexpr = _repeated(dtype, 32 // BITS)
    if BITS == 8:
        a, b, c, d = tl.inline_asm_elementwise(ASSEMBLY, registers, [words], dtype=types, is_pure=True, pack=2)
        codes = _joined4(a, b, c, d)
    elif BITS == 4:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASSEMBLY, registers, [words], dtype=types, is_pure=True, pack=2
        )
        codes = _joined8(a, b, c, d, e, f, g, h)
    else:
        a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = tl.inline_asm_elementwise(
            ASSEMBLY, registers, [words], dtype=types, is_pure=True, pack=2
        )
        codes = _joined16(a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q)
    return codes


@triton.jit
def _plain_codes(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of words, plus ``code_offset``, along axes of two that are added at the end."""
    if BITS == 8:
        codes = _joined4(words, words >> 8, words >> 16, words >> 24)
    elif BITS == 4:
        codes = _joined8(
            words, words >> 4, words >> 8, words >> 12, words >> 16, words >> 20, words >> 24, words >> 28
        )  # fmt: skip
    else:
        codes = _joined16(
            words, words >> 2, words >> 4, words >> 6, words >> 8, words >> 10, words >> 12, words >> 14,
            words >> 16, words >> 18, words >> 20, words >> 22, words >> 24, words >> 26, words >> 28, words >> 30,
        )  # fmt: skip
    offset: tl.constexpr = code_offset(BITS, dtype)
    return round_to((codes & (2**BITS - 1)).to(tl.float32) + offset, dtype)


@triton.jit
def _joined4(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _joined8(a, b, c, d, e, f, g, h):
    return tl.join(_joined4(a, c, e, g), _joined4(b, d, f, h))


@triton.jit
def _joined16(a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):
    return tl.join(_joined8(a, c, e, g, i, k, n, p), _joined8(b, d, f, h, j, m, o, q))


@triton.jit
def words_of_low_bytes(integers):
    """Return words of the low bytes of int32 [words, 4]."""
    if INTERPRETED:
        words = tl.sum((integers & 0xFF) << (8 * tl.arange(0, 4))[None, :], axis=1)
    else:
        evens, odds = tl.split(tl.reshape(integers, (integers.shape[0], 2, 2)))
        first, third = tl.split(evens)
        second, fourth = tl.split(odds)
        words = tl.inline_asm_elementwise(
            "{ .reg .b32 l, h; prmt.b32 l, $1, $2, 0x40; prmt.b32 h, $3, $4, 0x40; prmt.b32 $0, l, h, 0x5410; }",
            "=r,r,r,r,r",
            [first, second, third, fourth],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return words


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
