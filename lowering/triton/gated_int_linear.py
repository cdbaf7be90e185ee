"""``quarot::gated_int_linear`` by the kernels of ``int_linear``, which gate what they have in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quarot_fx.lowering.triton.int_linear import int_linear


def gated_int_linear(*arguments: Any, launch: Mapping[str, Any] | None = None) -> Tensor:
    """Return what the op declares."""
    *operands, dtype, activation = arguments
    return int_linear(*operands, None, dtype, launch=launch, activation=activation)
