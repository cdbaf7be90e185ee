"""``quarot::pack_weight``: codes of a weight become the bytes that matrix products read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quarot_fx.ops.pack_weight import BLOCK, NIBBLE_OFFSET, packed_width


@triton.jit
def _pack_weight(
    codes, packed, size, width, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if BITS == 4:
        place = block * BLOCK + tl.arange(0, BLOCK // 2)
        FILL: tl.constexpr = 0 if SIGNED else OFFSET
        low = tl.load(codes + row * size + place, mask=place < size, other=FILL).to(tl.int32)
        high = tl.load(codes + row * size + place + BLOCK // 2, mask=place + BLOCK // 2 < size, other=FILL).to(tl.int32)
        FLIP: tl.constexpr = OFFSET if SIGNED else 0
        byte = ((low & 15) ^ FLIP) | (((high & 15) ^ FLIP) << 4)
        tl.store(packed + row * width + block * (BLOCK // 2) + tl.arange(0, BLOCK // 2), byte.to(tl.uint8))
    else:
        place = block * BLOCK + tl.arange(0, BLOCK)
        code = tl.load(codes + row * size + place, mask=place < size, other=0).to(tl.int32)
        tl.store(packed + row * width + place, (code if SIGNED else code - 128).to(tl.int8), mask=place < size)


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Return what the op declares."""
    size = codes.shape[-1]
    width = packed_width(size, bits)
    packed = codes.new_empty((*codes.shape[:-1], width), dtype=torch.uint8 if bits == 4 else torch.int8)
    if packed.numel():
        grid = (packed.numel() // width, triton.cdiv(size, BLOCK))
        signed = codes.dtype == torch.int8
        _pack_weight[grid](
            codes.contiguous(), packed, size, width, BITS=bits, SIGNED=signed, BLOCK=BLOCK, OFFSET=NIBBLE_OFFSET
        )
    return packed
