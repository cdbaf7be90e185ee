"""Who reads a tensor's last axis, through casts and views that leave that axis alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from quarot_fx.graph import Constants, argument_nodes, is_tensor, reads_values
from quarot_fx.linear_like import LinearLike, linear_likes

CASTS = {
    "aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy.default", "aten.type_as.default", "aten.alias.default",
    "aten.contiguous.default", "aten.clone.default", "aten.detach.default", "aten.to.device",
}  # fmt: skip
VIEWS = {
    "aten.view.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.expand.default",
    "aten.flatten.using_ints", "aten._unsafe_view.default", "aten.repeat.default", "aten.repeat_interleave.self_int",
}  # fmt: skip
SCALINGS = {"aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"}
ROWS = {"aten.index.Tensor", "aten.index_select.default", "aten.slice.Tensor", "aten.select.int"}


@dataclass(frozen=True)
class Blocked:
    """Something other than a linear layer reads the tensor."""

    reason: str


def keeps_last_axis(node: fx.Node) -> bool:
    """Whether a node only casts its first operand, or takes or arranges whole vectors of its last axis."""
    target = str(node.target)
    operands = argument_nodes(node)
    if not operands or not is_tensor(operands[0]) or not is_tensor(node):
        return False
    shape, origin = node.meta["val"].shape, operands[0].meta["val"].shape
    if target in CASTS:
        return node.meta["val"].dtype.is_floating_point
    if not shape or not origin or not isinstance(shape[-1], int) or shape[-1] != origin[-1]:
        return False
    if target == "aten.index.Tensor":
        return len(node.args[1]) < len(origin)  # type: ignore[arg-type]
    if target in ("aten.select.int", "aten.index_select.default", "aten.unsqueeze.default"):
        return len(origin) > 1 and int(node.args[1]) % len(origin) != len(origin) - 1  # type: ignore[arg-type]
    return target in VIEWS | ROWS


def scales_vectors(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node multiplies or divides x by a number, or by one number for each vector of its last axis; filling
    whole vectors with 0 is multiplying them by it.
    """
    if str(node.target) == "aten.masked_fill.Scalar":
        filled, mask, number = node.args[:3]
        return filled is x and bool(number == 0) and isinstance(mask, fx.Node) and _is_one_for_each_vector(mask)
    if str(node.target) not in SCALINGS or not is_tensor(node) or node.args[0] is node.args[1]:
        return False
    factors = [operand for operand in argument_nodes(node) if operand is not x]
    spans = node.meta["val"].shape[-1:] == x.meta["val"].shape[-1:]
    is_numerator = node.args[0] is x or "mul" in str(node.target)
    return spans and is_numerator and all(_is_one_for_each_vector(factor) for factor in factors)


def _is_one_for_each_vector(factor: fx.Node) -> bool:
    if not is_tensor(factor):
        return True  # a symbolic number
    shape = factor.meta["val"].shape
    return not shape or (isinstance(shape[-1], int) and shape[-1] == 1)


class Readers:
    """Finds the linear layers that read a tensor's last axis, for one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.linears: Mapping[fx.Node, LinearLike] = {linear.node: linear for linear in linear_likes(graph)}
        self.constants = Constants(graph)

    def of(self, node: fx.Node, through_scalings: bool = False) -> list[LinearLike] | Blocked:
        """Return the linear layers that read the node, or what stands in the way of saying so.

        Args:
            node: whose last axis is read.
            through_scalings: look past products with a number, or with one number for each vector of the last axis.
        """
        found: list[LinearLike] = []
        pending = [node]
        while pending:
            current = pending.pop(0)
            for user in current.users:
                linear = self.linears.get(user)
                if linear is not None and linear.x is current and argument_nodes(user).count(current) == 1:
                    found.append(linear)
                elif (keeps_last_axis(user) and argument_nodes(user)[0] is current) or (
                    through_scalings and scales_vectors(user, current)
                ):
                    pending.append(user)
                elif reads_values(user, current):
                    reader = "the graph's output" if user.op == "output" else f"{user.target} {user.name}"
                    return Blocked(f"it is read by {reader}, not by linear layers only")
        return found or Blocked("nothing reads it")
