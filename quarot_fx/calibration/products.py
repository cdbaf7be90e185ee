"""Which rows of a layer's input meet which matrix of its weight: all meet the only one, or each goes to an expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quarot_fx.config import QuantScheme
from quarot_fx.graph import argument_nodes
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.passes.quantized import quantization_of
from quarot_fx.store import expression

BY_NUMBER = {"quarot.expert_linear.default"}  # every row names its expert
BY_OFFSET = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}  # rows are sorted by expert
ROUTE = 2  # where both keep that, among their argument nodes


@dataclass(frozen=True)
class Product:
    """A linear layer whose weight is to be calibrated.

    Attributes:
        linear: the layer.
        quantization: the ``quarot::quantize_weight`` node that makes its codes.
    """

    linear: LinearLike
    quantization: fx.Node

    @property
    def scheme(self) -> QuantScheme:
        """How the weight is quantised."""
        _, bits, group, clip, symmetric, _ = self.quantization.args
        return QuantScheme(bits, group, symmetric, "search" if clip is None else clip)  # type: ignore[arg-type]

    @property
    def stack(self) -> torch.Size:
        """The axes of the weight before its last two: nothing, or experts."""
        return self.weight.meta["val"].shape[:-2]

    @property
    def weight(self) -> fx.Node:
        """What is quantised, [rows, n] or with experts in front."""
        return self.quantization.args[0]  # type: ignore[return-value]

    @property
    def x(self) -> fx.Node:
        """The input, [..., n]."""
        return self.linear.x

    @property
    def route(self) -> fx.Node | None:
        """What says which row goes to which expert, if rows are routed."""
        operands = argument_nodes(self.linear.node)
        is_routed = str(self.linear.node.target) in BY_NUMBER | BY_OFFSET
        return operands[ROUTE] if is_routed and len(operands) > ROUTE and self.x.meta["val"].ndim == 2 else None

    @property
    def read(self) -> list[fx.Node]:
        """The nodes whose values tell the rows: the input, and the route if there is one."""
        return [self.x] if self.route is None else [self.x, self.route]

    def rows(self, x: Tensor, route: Tensor | None, matrix: int) -> Tensor:
        """Return the rows [m, n] of an input that meet one matrix of the weight, a stack of which is flattened."""
        if route is not None:
            if str(self.linear.node.target) in BY_NUMBER:
                return x[route == matrix]
            return x[0 if matrix == 0 else int(route[matrix - 1]) : int(route[matrix])]
        if self.stack:  # a batch of products
            batch = torch.broadcast_shapes(x.shape[:-2], self.stack)
            numbers = torch.arange(self.stack.numel(), device=x.device).view(self.stack).expand(batch)
            return x.expand(*batch, *x.shape[-2:])[numbers == matrix].flatten(0, 1)
        return x.reshape(-1, x.shape[-1])


def shared_inputs(graph: fx.Graph) -> list[list[Product]]:
    """Return the linear layers whose weights are to be calibrated in groups that share an input, and so a Hessian.

    Groups come in the order in which a graph computes their inputs. A weight that several layers read as it is counts
    where it is read first.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    groups: dict[Hashable, list[Product]] = defaultdict(list)
    seen: set[Hashable] = set()
    for product in calibrated_products(graph):
        key = expression(product.quantization).key
        if key not in seen:
            seen.add(key)
            by_number = str(product.linear.node.target) in BY_NUMBER
            groups[product.x, product.route, by_number, product.stack].append(product)
    return sorted(groups.values(), key=lambda group: max(order[node] for node in group[0].read))


def calibrated_products(graph: fx.Graph) -> Iterator[Product]:
    """Yield the linear layers of a graph whose weights are rounded by calibration, in order."""
    for linear in linear_likes(graph):
        quantization = quantization_of(linear.weight)
        if quantization is not None and quantization.args[-1] != "nearest":
            yield Product(linear, quantization)
