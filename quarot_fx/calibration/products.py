"""Which rows of a layer's input meet which matrix of its weight: all meet the only one, or each goes to an expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quarot_fx.calibration.calibrated import calibrated_by
from quarot_fx.config import QuantScheme
from quarot_fx.float64 import evaluate
from quarot_fx.graph import argument_nodes
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.passes.quantized import quantization_of, quantized_activation
from quarot_fx.store import expression

BY_NUMBER = {"quarot.expert_linear.default"}  # every row names its expert
BY_OFFSET = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}  # rows are sorted by expert
ROUTE = 2  # where both keep that, among their argument nodes


@dataclass(frozen=True)
class Product:
    """A linear layer of which something is to be calibrated.

    Attributes:
        linear: the layer.
        quantization: the ``quarot::quantize_weight`` node that makes the weight's codes, if calibration finds these.
        activation: how its input is quantised, if calibration finds the clip ratio.
    """

    linear: LinearLike
    quantization: fx.Node | None
    activation: QuantScheme | None = None

    @property
    def scheme(self) -> QuantScheme:
        """How the weight is quantised."""
        assert self.quantization is not None
        _, bits, group, clip, symmetric, *_ = self.quantization.args
        searched = "output" if self.quantization.kwargs.get("error") == "output" else "search"
        return QuantScheme(bits, group, symmetric, searched if clip is None else clip)  # type: ignore[arg-type]

    @property
    def rounding(self) -> str:
        """How the weight is rounded."""
        assert self.quantization is not None
        return str(self.quantization.args[5])

    @property
    def stack(self) -> torch.Size:
        """The axes of the weight before its last two: nothing, or experts."""
        return self.linear.weight.meta["val"].shape[:-2]

    @property
    def weight(self) -> fx.Node:
        """The weight as a constant: what is quantised, if it is; otherwise as the layer has it."""
        return self.linear.weight if self.quantization is None else self.quantization.args[0]  # type: ignore[return-value]

    def matrices(self) -> Tensor:
        """Return the weight before it is quantised, [matrices, rows, n] in float32."""
        weight = evaluate(self.weight).float()
        if self.quantization is None and self.linear.spelling.contracted != -1:
            weight = weight.mT
        return weight.reshape(-1, *weight.shape[-2:])

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
    def source(self) -> fx.Node:
        """What is quantised to be the input; the input itself if it is not quantised."""
        activation = quantized_activation(self.x)
        return self.x if activation is None else activation.source

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


def shared_inputs(graph: fx.Graph, searched: Mapping[str, QuantScheme]) -> list[list[Product]]:
    """Return the linear layers of which something is to be calibrated in groups that share an input, and so a Hessian.

    Groups come in the order in which a graph computes their inputs. A weight that several layers read as it is counts
    where it is read first.

    Args:
        graph: of the model, with weights as codes.
        searched: name of a linear layer -> how its input is quantised, if the clip ratio is to be searched for.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    groups: dict[Hashable, list[Product]] = defaultdict(list)
    seen: set[Hashable] = set()
    for product in calibrated_products(graph, searched):
        key = expression(product.quantization or product.weight).key
        if key not in seen:
            seen.add(key)
            by_number = str(product.linear.node.target) in BY_NUMBER
            groups[product.x, product.route, by_number, product.stack].append(product)
    return sorted(groups.values(), key=lambda group: max(order[node] for node in group[0].read))


def calibrated_products(graph: fx.Graph, searched: Mapping[str, QuantScheme]) -> Iterator[Product]:
    """Yield the linear layers of a graph of which calibration finds codes or a clip ratio, in order."""
    for linear in linear_likes(graph):
        quantization, activation = quantization_of(linear.weight), searched.get(linear.node.name)
        if quantization is not None and not calibrated_by(quantization):
            quantization = None
        if quantization is not None or activation is not None:
            yield Product(linear, quantization, activation)
