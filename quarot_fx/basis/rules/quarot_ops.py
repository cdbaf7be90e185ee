"""Our own operators, which passes put in place of what they recognise."""

from __future__ import annotations

import torch

from quarot_fx import ops  # noqa: F401  registers torch.ops.quarot
from quarot_fx.basis.operator import Operator
from quarot_fx.basis.rules import rule

quarot = torch.ops.quarot


@rule(quarot.mean_square.default)
def mean_square(op: Operator) -> None:
    """``|Q x|^2 = |x|^2``: read in any basis; every other axis is read entry by entry."""
    op.pin([*op["x"].axes()[:-1], *op.result.axes()[:-1]], "squares each entry of this axis")


@rule(quarot.project_out.default)
def project_out(op: Operator) -> None:
    """``x - (x.u) u`` is itself in x's basis if u is: the mean's direction is rotated with the stream."""
    x, u = op["x"], op["u"]
    op.tie(x.axis(-1), op.result.axis(-1))
    op.tie(u.axis(0), op.result.axis(-1))
    for axis, result in zip(x.axes()[:-1], op.result.axes()[:-1], strict=True):
        op.tie(axis, result)


@rule(quarot.expert_linear.default)
def expert_linear(op: Operator) -> None:
    """A linear layer whose weight each row picks: all experts of a stack share their bases."""
    x, weight, experts = op["x"], op["weight"], op["experts"]
    op.tie(x.axis(-1), weight.axis(-1))
    op.tie(weight.axis(1), op.result.axis(-1))
    op.pin([x.axis(0), weight.axis(0), op.result.axis(0), *experts.axes()], "picks the expert by row")


@rule(quarot.rotate.default)
def rotate(op: Operator) -> None:
    """A transform that is there already: its axis is taken as it is, the others pass."""
    x, dim = op["x"], op["dim"] % op["x"].ndim
    for axis, result in zip(x.axes(), op.result.axes(), strict=True):
        if axis.dim == dim:
            op.pin([axis, result], "is a transform that is in the graph already")
        else:
            op.tie(axis, result)
