"""New tensors. Where they are made in the shape of another, nothing is read of that one but its sizes."""

from __future__ import annotations

import torch

from quarot_fx.basis.operator import Operator
from quarot_fx.basis.rules import rule

aten = torch.ops.aten


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
      aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)  # fmt: skip
def nothing(op: Operator) -> None:
    """Zeros are zeros in every basis, and what has no content yet is in any. Rotating either is never needed."""


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default,
      aten.full.default, aten.full_like.default, aten.new_full.default)  # fmt: skip
def filled(op: Operator) -> None:
    """One value everywhere, and so in no basis but the canonical one."""
    op.barrier("is filled with one value", op.results)
