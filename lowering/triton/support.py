"""Which arguments the kernels take: for each op, why not, or ``None``. Reads shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quarot_fx.lowering.triton.device import FIRST_FLOAT8, FIRST_SUPPORTED, describe, runs_interpreted
from quarot_fx.lowering.triton.rotation_matrices import Split, split, split_of
from quarot_fx.ops.append_pair import arguments_of_each
from quarot_fx.rotation import Rotation

LARGEST_ROW = 65536  # elements that one program holds in registers
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_TOKEN = 16384  # elements that every program of a product holds in registers besides its weights
MOST_FLOAT_TOKENS = 16  # that a product of floats takes: the narrowest tile of the tensor cores
LARGEST_HEAD = 256
MOST_GROUP_QUERIES = 64  # of the heads that share keys and values: the rows of a program's tile
PACKED_BITS = (2, 4, 8)  # of codes that never straddle two bytes
WORD = 32  # bits, that a kernel reads at least
LARGEST_INT_SUM = 2**31 // (16 * 8 * 128)  # codes whose products, with the unpacked weight's factor 16, fit int32


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _reason_against_device(device: torch.device, *dtypes: torch.dtype) -> str | None:
    if not _has_triton():
        return "Triton is not installed"
    if device.type != "cuda":
        return None if runs_interpreted() else f"Triton's kernels run on NVIDIA GPUs, not on {device.type}"
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs, not for AMD's"
    capability = describe(device).capability
    if capability < FIRST_SUPPORTED:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 (Ampere)"
    if torch.float8_e4m3fn in dtypes and capability < FIRST_FLOAT8:
        return "the GPU has no float8 tensor cores"
    return None


def _reason_against_row(x: Tensor) -> str | None:
    if x.dtype not in FLOATS:
        return f"the activation is {x.dtype}"
    if x.shape[-1] > LARGEST_ROW:
        return f"rows of {x.shape[-1]} elements are longer than {LARGEST_ROW}"
    return None


def _quantize_activation(
    x: Tensor, bits: int, group: int | None, clip: float, symmetric: bool, container: torch.dtype
) -> str | None:
    return _reason_against_device(x.device, container) or _reason_against_row(x)


def _int_linear(codes: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> str | None:
    _, _, weight_scale, weight_zero, _, weight_bits, _, _, dtype = rest
    if reason := _reason_against_device(codes.device, codes.dtype):
        return reason
    size, groups, weight_groups = codes.shape[-1], scale.shape[-1], weight_scale.shape[-1]
    is_float8 = codes.dtype == torch.float8_e4m3fn
    if dtype not in FLOATS:
        return f"the result is {dtype}"
    if is_float8 and weight_bits == 8:
        return "codes in float8 meet a weight of 8 bits"
    if size > LARGEST_INT_SUM:
        return f"sums of {size} products may overflow int32"
    if groups > 1 and weight_groups > 1 and groups != weight_groups:
        return "both operands are grouped, in groups of different sizes"
    for count in (groups, weight_groups):
        group = size // count
        if count > 1 and group % 128 and group not in (32, 64):
            return f"groups of {group}: the kernels take 32, 64 and multiples of 128"
    has_offset = is_float8 or weight_zero is not None
    if has_offset and weight_groups > groups:
        return "zero points of the weight's groups need sums of the activation's codes for each of them"
    return None


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if reason := _reason_against_token(x, x.dtype, MOST_FLOAT_TOKENS):
        return reason
    if x.dtype == torch.float32 or weight.dtype != x.dtype:
        return f"the activation is {x.dtype}, and the weight {weight.dtype}"
    return None


def _gated_int_linear(*arguments: Any) -> str | None:
    *operands, dtype, _ = arguments
    return _int_linear(*operands, None, dtype)


def _norm_int_linear(x: Tensor, *rest: Any) -> str | None:
    *_, dtype, _ = rest
    return _reason_against_token(x, dtype)


def _reason_against_token(x: Tensor, dtype: torch.dtype, most: int = 1) -> str | None:
    if reason := _reason_against_device(x.device) or _reason_against_row(x):
        return reason
    if dtype not in FLOATS:
        return f"the result is {dtype}"
    if x.numel() > most * x.shape[-1]:
        return f"there are more tokens than {most}"
    if x.shape[-1] > LARGEST_TOKEN:
        return f"a token of {x.shape[-1]} elements is longer than {LARGEST_TOKEN}, which each program would hold"
    return None


def _pack_weight(codes: Tensor, bits: int) -> str | None:
    return _reason_against_device(codes.device)


def _norm_quantize(x: Tensor, addend: Tensor | None, *rest: Any) -> str | None:
    return _reason_against_device(x.device, rest[-1]) or _reason_against_row(x)


def _rotate(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> str | None:
    if reason := _reason_against_device(x.device) or _reason_against_row(x):
        return reason
    if dim % x.dim() != x.dim() - 1:
        return f"axis {dim} is not the last one"
    return _reason_against_split(x, split_of(x, rotation, inner), rotation)


def _reason_against_split(x: Tensor, cut: Split | None, rotation: str) -> str | None:
    if cut is None or cut.shared_bytes(x.dtype) > describe(x.device).shared_bytes:
        return f"{rotation} over rows of {x.shape[-1]} elements has no split into matrices that a program can hold"
    return None


def _rotate_quantize(
    x: Tensor, gate: Tensor | None, activation: str, rotation: str, inner: int, bits: int, group: int | None, *rest: Any
) -> str | None:
    if reason := _reason_against_device(x.device, rest[-1]) or _reason_against_row(x):
        return reason
    if group is not None and group != x.shape[-1]:
        return "groups of a rotated row have no kernel"
    return _reason_against_split(x, split(Rotation.parse(rotation), x.shape[-1], inner, x.dtype), rotation)


def _rope_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, rotation: str, balance: str | None = None, inverse: bool = False
) -> str | None:
    if reason := _reason_against_device(x.device) or _reason_against_row(x):
        return reason
    return _reason_against_head(x.shape[-1])


def _append(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    x: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    balance: str | None,
    rotation: str | None,
    bits: int,
    group: int | None,
    clip: float,
) -> str | None:
    if reason := _reason_against_device(x.device) or _reason_against_row(x):
        return reason
    size = x.shape[-1]
    if any(tensor.stride(-1) != 1 for tensor in (codes, scale, zero)):
        return "the cache has gaps in its last axis"
    if cos is not None and balance is None and rotation is None:
        return "an embedding with nothing after it is left to the compiler of the rest"
    if group is not None and group != size and group & (group - 1):
        return f"groups of {group}: the kernel takes whole heads and powers of two"
    return _reason_against_head(size) or _reason_against_bits(bits)


def _append_pair(*args: Any) -> str | None:
    keys, values = arguments_of_each(*args)
    return _append(*keys) or _append(*values)


def _reason_against_bits(bits: int) -> str | None:
    return None if bits in PACKED_BITS else f"codes of {bits} bits have no kernel; those of 2, 4 and 8 have"


def _reason_against_head(size: int) -> str | None:
    return f"heads of {size} elements are larger than {LARGEST_HEAD}" if size > LARGEST_HEAD else None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    if reason := _reason_against_attention(q, k, v.shape[-1], mask):
        return reason
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def _attend_packed(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    v_size: int,
) -> str | None:
    return (
        _reason_against_attention(q, k_codes, v_size, mask)
        or _reason_against_codes(k_bits, q.shape[-1], k_scale)
        or _reason_against_codes(v_bits, v_size, v_scale)
    )


def _reason_against_codes(bits: int, size: int, scale: Tensor) -> str | None:
    if reason := _reason_against_bits(bits):
        return reason
    if scale.dtype != torch.float32:
        return f"scales are {scale.dtype}"
    if size % (WORD // bits):
        return f"{size} codes of {bits} bits are no whole words"
    group = size // scale.shape[-1]
    if group != size and (group & (group - 1) or group < 2 * WORD // bits):
        return f"groups of {group}: the kernel takes whole heads, and powers of two from 64 bits on"
    return None


def _reason_against_attention(q: Tensor, k: Tensor, v_size: int, mask: Tensor | None) -> str | None:
    if reason := _reason_against_device(q.device) or _reason_against_head(max(q.shape[-1], v_size)):
        return reason
    if q.dtype not in FLOATS:
        return f"queries are {q.dtype}"
    if mask is not None and mask.dtype not in (*FLOATS, torch.bool):
        return f"the mask is {mask.dtype}"
    group = q.shape[1] // k.shape[1]
    if group * q.shape[2] > MOST_GROUP_QUERIES:
        return f"{q.shape[2]} queries of {group} heads that share keys are more than {MOST_GROUP_QUERIES}"
    return None


REASONS: dict[str, Callable[..., str | None]] = {
    "append": _append,
    "append_dequantize": _append,
    "append_pair": _append_pair,
    "attend": _attend,
    "attend_packed": _attend_packed,
    "float_linear": _float_linear,
    "gated_int_linear": _gated_int_linear,
    "int_linear": _int_linear,
    "norm_int_linear": _norm_int_linear,
    "norm_quantize": _norm_quantize,
    "pack_weight": _pack_weight,
    "quantize_activation": _quantize_activation,
    "rope_rotate": _rope_rotate,
    "rotate": _rotate,
    "rotate_quantize": _rotate_quantize,
}
