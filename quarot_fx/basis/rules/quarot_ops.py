"""Our own operators, which passes put in place of what they recognise."""

from __future__ import annotations

import torch

from quarot_fx import ops  # noqa: F401  registers torch.ops.quarot
from quarot_fx.basis.operator import Operator
from quarot_fx.basis.rules import rule
from quarot_fx.rotation import Rotation

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
    """A transform that is there already: one side is canonical, and the other in the basis that it names."""
    x, y, dim = op["x"], op.result, op["dim"] % op["x"].ndim
    for axis, result in zip(x.axes(), y.axes(), strict=True):
        if axis.dim != dim:
            op.tie(axis, result)
    turned, other = (y, x) if op["inverse"] else (x, y)
    op.pin(other.axis(dim), "is a transform that is in the graph already")
    if Rotation.parse(op["rotation"]).order == x.shape[dim]:
        op.turn(turned.axis(dim), op["rotation"])
    else:
        op.pin(turned.axis(dim), "is a transform of a part of this axis that is in the graph already")


@rule(quarot.balance.default)
def balance(op: Operator) -> None:
    """Each head times a matrix of its own, which knows its channels in no other basis."""
    x, y = op["x"], op.result
    for axis, result in zip(x.axes(), y.axes(), strict=True):
        if axis.dim in (x.ndim - 3, x.ndim - 1):
            op.pin([axis, result], "multiplies each head by a matrix of its own")
        else:
            op.tie(axis, result)


@rule(quarot.quantize_asymmetric.default, quarot.quantize_symmetric.default)
def quantization(op: Operator) -> None:
    """Codes stand for numbers in the basis in which they were rounded."""
    op.barrier("quantises this, and its codes are held so")


@rule(quarot.dequantize.default)
def dequantization(op: Operator) -> None:
    """What is read of a cache of codes is in the basis in which it was rounded when it was written."""
    op.barrier("reads codes, which are held so")
