"""Writes to tensors of the caller's: what enters them is what the caller will read."""

from __future__ import annotations

import torch

from quarot_fx.basis.operator import Operator
from quarot_fx.basis.rules import rule

aten = torch.ops.aten


@rule(aten.copy_.default)
def copy_(op: Operator) -> None:
    """``cache <- new content``: a functional graph ends with these."""
    op.barrier("writes a tensor of the caller's")
