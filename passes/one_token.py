"""Products of one token, whose programs may make its codes themselves: what the passes share that fuse what does."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.graph import value
from quarot_fx.ops.norm_int_linear import WEIGHT_BITS
from quarot_fx.program import Program

quarot = torch.ops.quarot


def products_of(
    program: Program, quantizing: torch._ops.OpOverload, *targets: Any
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Return each product, a call of one of the ``targets``, with what makes its codes, if that is such a call."""
    for target in targets:
        for product in program.graph.find_nodes(op="call_function", target=target):
            codes: Any = argument(product, "codes")
            source = codes.all_input_nodes[0] if codes.target is operator.getitem else codes
            if source.target is quantizing:
                yield product, source


def reason_against_one_token(product: fx.Node, source: fx.Node) -> str | None:
    """Return why the kernels cannot make the codes that ``source`` makes, or multiply by the product's weight."""
    x = value(argument(source, "x"))
    if not all(isinstance(size, int) and size == 1 for size in x.shape[:-1]):
        return f"an activation {tuple(x.shape)} is more than one token, or not known to be one"
    if argument(source, "container") != torch.int8 or not argument(source, "symmetric"):
        return "codes are in another type than int8, or have zero points"
    if any(argument(product, name) is not None for name in ("weight_zero", "weight_sum")):
        return "the weight has zero points"
    if any(value(argument(product, name)).shape[-1] > 1 for name in ("scale", "weight_scale")):
        return "a scale is of a group"
    if argument(product, "weight_bits") != WEIGHT_BITS:
        return f"the weight has {argument(product, 'weight_bits')} bits, and the kernel takes {WEIGHT_BITS}"
    others = {user for part in source.users for user in part.users} - {product}
    if others:
        return f"the same codes are read by {', '.join(sorted(other.name for other in others))}"
    return None
