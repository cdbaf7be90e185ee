"""``quarot::rotate`` on tensor cores, for the sizes that no kernel of ours holds in registers.

The reference multiplies in float32, a factor at a time; here every product is of the activation's own type, which is
rounded to it in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarot_fx.rotation import Rotation

HALVES = (torch.bfloat16, torch.float16)


def reason_against(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> str | None:
    """Say why the reference is as good, or ``None``."""
    if x.device.type == "cpu":
        return "the reference is as fast on the CPU"
    return None if x.dtype in HALVES else f"the reference computes {x.dtype} in the same way"


def rotate(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> Tensor:
    """Return what the op declares."""
    return Rotation.parse(rotation).apply(x, dim, inner, inverse, dtype=x.dtype)


def prepare(x: Tensor, rotation: str, dim: int = -1, inner: int = 1, inverse: bool = False) -> None:
    """Make the matrices."""
    Rotation.parse(rotation).prepare(x.device, x.dtype)
