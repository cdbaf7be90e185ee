"""What launches need besides their arguments, made when a graph is compiled: the matrices of rotations.

A kernel that is launched for the first time while a CUDA graph is recorded would make them in memory that belongs to
the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quarot_fx.lowering.triton.append_prompt import SIZES
from quarot_fx.lowering.triton.rotation_matrices import (
    head_matrices,
    head_matrices_by_thread,
    head_slabs,
    matrices,
    possible_splits,
    split,
)
from quarot_fx.lowering.triton.stacked_slabs import stacked, stacked_matrices
from quarot_fx.ops.append_pair import arguments_of_each
from quarot_fx.rotation import Rotation


def _rotate(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> None:
    for cut in possible_splits(x, rotation, inner):
        matrices(cut, x.device, x.dtype, inverse)


def _rotate_quantize(x: Tensor, gate: Tensor | None, activation: str, rotation: str, inner: int, *scheme: Any) -> None:
    if cut := split(Rotation.parse(rotation), x.shape[-1], inner, x.dtype):
        matrices(cut, x.device, x.dtype)
        if slabs := stacked(cut):
            stacked_matrices(slabs, x.device)


def _rope_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, rotation: str, balance: str | None = None, inverse: bool = False
) -> None:
    if balance is None and (cut := head_slabs(rotation, x.shape[-1], x.dtype)):
        matrices(cut, x.device, x.dtype)
    else:
        head_matrices(x.shape[-1], x.device, x.dtype, rotation, balance, inverse)


def _append(*args: Any) -> None:
    x, balance, rotation = args[3], args[7], args[8]
    if balance is not None or rotation is not None:
        head_matrices(x.shape[-1], x.device, x.dtype, rotation, balance)
        if x.shape[-1] in SIZES:
            head_matrices_by_thread(x.shape[-1], x.device, x.dtype, rotation, balance)


def _append_pair(*args: Any) -> None:
    for each in arguments_of_each(*args):
        _append(*each)


PREPARATIONS: dict[str, Callable[..., None]] = {
    "append": _append,
    "append_dequantize": _append,
    "append_pair": _append_pair,
    "rope_rotate": _rope_rotate,
    "rotate": _rotate,
    "rotate_quantize": _rotate_quantize,
}
