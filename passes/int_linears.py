"""How passes read ``int_linear``: what weights must have in common to be one weight, and how they become one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import fx

from quarot_fx.graph import PART, Constants

# The places of int_linear's arguments; gated_int_linear has those before the residual in common with it.
ACTIVATION = slice(0, 4)  # codes, scale, zero, sum
WEIGHT = range(4, 8)  # codes, scale, zero, sum
BITS, BIAS, RESIDUAL, DTYPE = range(8, 12)


def storage(node: fx.Node, constants: Constants) -> Hashable:
    """Return what is equal for products whose weights can be one; a product whose weight cannot equals itself only."""
    parts: tuple[Any, ...] = (*(node.args[place] for place in WEIGHT), node.args[BIAS])
    if node.args[RESIDUAL] is not None or any(part is not None and part not in constants for part in parts):
        return node
    groups = parts[1].meta["val"].shape[-1]
    return groups, tuple(part is None for part in parts), node.args[BITS], node.args[DTYPE]


def joined(nodes: Sequence[fx.Node], join: Callable[[list[fx.Node]], fx.Node]) -> tuple[Any, ...]:
    """Return the arguments before the residual of one product in the place of several of one activation and storage.

    Args:
        nodes: calls of ``int_linear``.
        join: inserts what makes one tensor of those that hold a part of each weight, [rows, ...].
    """

    def part(place: int) -> fx.Node | None:
        parts: list[Any] = [node.args[place] for node in nodes]
        if parts[0] is None:
            return None
        whole = join(parts)
        whole.meta[PART] = parts[0].meta.get(PART, "bias")
        return whole

    first = nodes[0].args
    return (*first[ACTIVATION], *map(part, WEIGHT), first[BITS], part(BIAS))
