"""Activations are told by their values: any elementwise expression of one tensor is tried at many points."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from quarot_fx.graph import is_float, is_tensor
from quarot_fx.ops.activations import ACTIVATIONS
from quarot_fx.passes.matching import before_casts, before_widening

LONGEST = 12  # operators that an activation may be written with
TOLERANCE = 1e-7  # constants may be written with eight digits
_MAGNITUDES = torch.logspace(-4, 38, 1000, dtype=torch.float64, device="cpu")
POINTS = torch.cat([-_MAGNITUDES, torch.zeros(1, dtype=torch.float64, device="cpu"), _MAGNITUDES])


def activation_of(node: fx.Node) -> tuple[str, fx.Node] | None:
    """Return which of the ops' activations a node is the result of, and what it was applied to; casts do not count.

    ``x * sigmoid(x)`` is ``silu``, and ``0.5 x (1 + tanh(0.79788456 (x + 0.044715 x^3)))`` is ``gelu_tanh``.
    """
    inside: list[fx.Node] = []
    edge = {before_casts(node)}
    while len(inside) < LONGEST:
        latest = max(edge)  # in the order of the graph: whatever reads it is inside
        sources = latest.all_input_nodes
        is_elementwise = torch.Tag.pointwise in getattr(latest.target, "tags", ())
        if not is_elementwise or not is_float(latest) or not all(is_tensor(source) for source in sources):
            return None
        inside.append(latest)
        edge = (edge - {latest}) | {before_casts(source) for source in sources}
        if len(edge) == 1:
            (x,) = edge
            if (name := _name_of(reversed(inside), x)) is not None:
                return name, before_widening(x)
        if not edge:
            return None
    return None


def _name_of(nodes: Iterable[fx.Node], x: fx.Node) -> str | None:
    values: dict[fx.Node, Tensor] = {x: POINTS}
    result = POINTS
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[before_casts(source)])
        values[node] = result = node.target(*args, **kwargs)  # type: ignore[operator]
    for name, function in ACTIVATIONS.items():
        if name != "identity" and torch.allclose(result, function(POINTS), TOLERANCE, TOLERANCE):
            return name
    return None
