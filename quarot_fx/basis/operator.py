"""What a rule sees of an operator, and what it can say.

Every tensor has axes, every axis a basis. An operator reads tensors through *uses*: on the edge between a tensor and a
use the plan may change the basis, at a cost. A rule ties axes of uses and results that are in the same basis, and pins
those that must be canonical; it turns those that a transform of the graph's own takes to another basis. What it says
nothing about may be in any basis at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_aggregate

from quarot_fx.basis.factors import Factors
from quarot_fx.graph import is_tensor, numel_hint


class Axis(NamedTuple):
    """One dimension of one tensor."""

    tensor: Tensor
    dim: int

    @property
    def size(self) -> Any:
        """Elements: an int, or a sympy expression when symbolic."""
        return self.tensor.shape[self.dim]

    @property
    def is_opaque(self) -> bool:
        """Whether nothing can be said of the axis, its size not being known at compile time."""
        return self.tensor.factors[self.dim] is None


class Tensor:
    """A tensor value: the result of a node (``user is None``), or its use as one argument of another node."""

    __slots__ = ("constant", "factors", "index", "node", "number", "numel", "shape", "user")

    def __init__(self, node: fx.Node, val: torch.Tensor, user: fx.Node | None = None, index: int = 0) -> None:
        self.node, self.user, self.index = node, user, index
        self.shape = tuple(size if isinstance(size, int) else size.node.expr for size in val.shape)
        self.numel = numel_hint(val.shape)
        self.factors: list[list[int] | None] = []
        self.constant = False
        self.number = -1

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def axis(self, dim: int) -> Axis:
        """Return one axis; negative numbers count from the last."""
        return Axis(self, dim % len(self.shape))

    def axes(self) -> list[Axis]:
        """Return all axes."""
        return [Axis(self, dim) for dim in range(len(self.shape))]


@dataclass(frozen=True)
class Tie:
    """The row-major product of the axes on the left is in the same basis as the one on the right."""

    left: tuple[Axis, ...]
    right: tuple[Axis, ...]
    why: str


@dataclass(frozen=True)
class Pin:
    """An axis that must be in the canonical basis."""

    axis: Axis
    why: str


@dataclass(frozen=True)
class Turn:
    """An axis that is in the basis of a rotation that the graph names.

    Attributes:
        node: the transform of the graph's own; it returns what it reads once the axis is in that basis.
        axis: the result's, if the transform is an inverse one, else that of the use.
        rotation: the orthogonal matrix, by name.
    """

    node: fx.Node
    axis: Axis
    rotation: str


class Operator:
    """One node, as its rule sees it."""

    def __init__(self, node: fx.Node, factors: Factors) -> None:
        self.node = node
        self.uses: list[Tensor] = []
        self.ties: list[Tie] = []
        self.pins: list[Pin] = []
        self.turns: list[Turn] = []
        self._factors = factors
        self._place = -1
        args, kwargs = map_aggregate((node.args, node.kwargs), self._use)
        self._arguments = self._by_name(args, kwargs)
        val = node.meta.get("val")
        vals = val if isinstance(val, tuple | list) else [val]
        self.results = [self._own(Tensor(node, v, index=i)) for i, v in enumerate(vals) if isinstance(v, torch.Tensor)]

    def _use(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        self._place += 1
        if not is_tensor(argument):
            return argument.meta.get("val")
        use = self._own(Tensor(argument, argument.meta["val"], self.node, self._place))
        self.uses.append(use)
        return use

    def _own(self, tensor: Tensor) -> Tensor:
        tensor.factors = [
            ([self._factors.new(size)] if size > 1 else []) if isinstance(size, int) else None for size in tensor.shape
        ]
        return tensor

    def _by_name(self, args: Any, kwargs: Any) -> dict[str, Any]:
        schema = getattr(self.node.target, "_schema", None)
        if schema is None:
            return {str(place): argument for place, argument in enumerate(args)} | dict(kwargs)
        named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        named.update(zip((a.name for a in schema.arguments), args, strict=False))
        return named | dict(kwargs)

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema; tensors come as uses."""
        return self._arguments.get(name)

    @property
    def result(self) -> Tensor:
        """The only result."""
        return self.results[0]

    @property
    def name(self) -> str:
        """The operator and its node, as reports name them."""
        if self.node.op != "call_function":
            return self.node.name
        return f"{str(self.node.target).removesuffix('.default')} {self.node.name}"

    def tie(self, left: Axis | Sequence[Axis], right: Axis | Sequence[Axis], why: str = "") -> None:
        """Say that two axes, or row-major products of axes, are in the same basis."""
        left = (left,) if isinstance(left, Axis) else tuple(left)
        right = (right,) if isinstance(right, Axis) else tuple(right)
        self.ties.append(Tie(left, right, why or self.name))

    def pin(self, axes: Axis | Iterable[Axis], why: str) -> None:
        """Say that axes must be canonical, and why."""
        for axis in (axes,) if isinstance(axes, Axis) else axes:
            self.pins.append(Pin(axis, f"{self.name}: {why}"))

    def turn(self, axis: Axis, rotation: str) -> None:
        """Say that the node returns what it reads where the axis is in the basis of a rotation."""
        self.turns.append(Turn(self.node, axis, rotation))

    def barrier(self, why: str, tensors: Iterable[Tensor] | None = None) -> None:
        """Pin every axis of the given tensors, or of all that the operator touches."""
        for tensor in (*self.uses, *self.results) if tensors is None else tensors:
            self.pin(tensor.axes(), why)
