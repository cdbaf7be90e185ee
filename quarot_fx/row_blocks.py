"""Which constants can be computed a few rows at a time: in float64 a whole one takes four times the memory of its
parameter, and as much again for every step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from quarot_fx.graph import argument_nodes
from quarot_fx.ops import pack, quantize_weight, rotate

aten = torch.ops.aten
BLOCK = 2**21  # elements: 16 MiB in float64

ELEMENTWISE = {
    aten.add.Tensor,
    aten.div.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    aten.sub.Tensor,
    aten.to.dtype,
}
OF_LAST_AXIS = {pack, quantize_weight}


def row_blocks(size: torch.Size) -> Iterator[slice]:
    """Return slices of the first axis of a tensor, of about ``BLOCK`` elements each, that together are all of it."""
    rows = max(1, BLOCK * size[0] // max(1, size.numel()))
    return (slice(start, min(start + rows, size[0])) for start in range(0, size[0], rows))


def computed_by_rows(node: fx.Node) -> list[fx.Node]:
    """Return the steps, in order, that a constant can be computed by some rows at a time, ``node`` last; none if it
    mixes rows itself, or is small. Steps before that mix rows, as a rotation of the first axis does, are there whole.

    A row of a step follows from the same row of those arguments that have as many, of as many axes, and from the whole
    of its other arguments.
    """
    size = size_of(node)
    if len(size) < 2 or size.numel() <= BLOCK:
        return []
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        step = pending.pop()
        if step in found or is_given(step) or _mixes(step) or any(_is_misaligned(one, size) for one in _sizes(step)):
            continue
        found[step] = None
        pending += [argument for argument in argument_nodes(step) if has_rows(argument, size)]
    return sorted(found)


def rotates_rows(node: fx.Node) -> bool:
    """Whether a node is a rotation of the first axis of a matrix that is not small, whose columns are independent."""
    size = size_of(node)
    return node.target is rotate and _mixes(node) and len(size) == 2 and size.numel() > BLOCK


def is_given(node: fx.Node) -> bool:
    """Whether rows are taken of a whole that is there anyway: a parameter, or codes of a weight."""
    return node.op == "get_attr" or node.target is operator.getitem


def has_rows(node: fx.Node, size: torch.Size) -> bool:
    """Whether a node's first axis is that of a tensor of some size that is made of it."""
    own = size_of(node)
    return len(own) == len(size) and own[0] == size[0]


def size_of(node: fx.Node) -> torch.Size:
    """Return the size of a node's value; of several results, that of the first."""
    value = node.meta["val"]
    size: torch.Size = (value if isinstance(value, torch.Tensor) else value[0]).shape
    return size


def _sizes(step: fx.Node) -> list[torch.Size]:
    return [size_of(argument) for argument in argument_nodes(step)]


def _is_misaligned(own: torch.Size, size: torch.Size) -> bool:
    return len(own) > len(size) or (len(own) == len(size) and own[0] not in (1, size[0]))


def _mixes(step: fx.Node) -> bool:
    """Whether a step may make a row of more than the same rows of its arguments."""
    if step.target is rotate:
        dim = step.args[2] if len(step.args) > 2 else -1
        return dim in (0, -len(size_of(step)))
    return step.target not in ELEMENTWISE | OF_LAST_AXIS
