"""Keys and values that a cache of the caller's holds as codes: they were quantised when they were written.

Or what they are made of is held, as of latent attention: what a linear layer makes of codes is never stored.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from quarot_fx import ops  # noqa: F401  registers torch.ops.quarot
from quarot_fx.aliasing import JOINS, PERMUTATIONS, RESHAPES, packet
from quarot_fx.attention import Read
from quarot_fx.config import UNQUANTIZED_BITS
from quarot_fx.graph import AUTHOR, argument_nodes, is_float, is_tensor, value

aten, quarot = torch.ops.aten, torch.ops.quarot
CONCATENATIONS = {aten.cat, aten.concat, aten.concatenate, aten.slice_scatter}
UNFILLED = {aten.empty, aten.empty_like, aten.new_empty}  # what parts are written into
MOVES = PERMUTATIONS | RESHAPES | JOINS.keys() | {
    *(aten.expand, aten.repeat, aten.repeat_interleave, aten.slice, aten.narrow, aten.index_select, aten.index),
    *(aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.roll, quarot.rotate,
      quarot.balance),
}  # fmt: skip
QUANTIZATIONS = {quarot.quantize_asymmetric.default, quarot.quantize_symmetric.default}


@dataclass(frozen=True)
class CacheCodes:
    """How a cache of the caller's holds the keys or values that an attention reads.

    Attributes:
        bits: of a code; 16 if a part of what is read is not held as codes.
        is_rotated: keys or values themselves are held, in another basis.
        is_balanced: they are held as balanced against queries, and brought back.
        written_by: the transforms of new tokens before they are quantised.
    """

    bits: int
    is_rotated: bool
    is_balanced: bool
    written_by: tuple[fx.Node, ...]


def codes_of_cache(read: Read) -> CacheCodes | None:
    """Return how the cache of a read holds it, or None if it is made of no codes but ours, or of none."""
    passed, origins = _followed_back(read.tensor)
    held = [node for node in origins if node.target is quarot.dequantize.default and AUTHOR not in node.meta]
    if not held:
        return None
    bits, written = [], dict[fx.Node, None]()
    for node in held:
        for made in _operators_on_codes(node):
            bits.append(int(made.args[1]))  # type: ignore[arg-type]
            if made.target in QUANTIZATIONS:
                written.update(dict.fromkeys(_transforms(_followed_back(argument_nodes(made)[0])[0])))
    most = max(bits) if bits and len(held) == len(origins) else UNQUANTIZED_BITS
    is_rotated = any(_transforms(passed)) and not any(node.target is aten.linear.default for node in passed)
    is_balanced = any(node.target is quarot.balance.default for node in passed)
    return CacheCodes(most, is_rotated, is_balanced, tuple(written))


def _followed_back(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Follow a tensor back through what moves, joins or rotates vectors, and through linear layers.

    Returns:
        the nodes on the way, and those that it is made of.
    """
    passed: dict[fx.Node, None] = {}
    origins: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop(0)
        if packet(current) in CONCATENATIONS:  # an empty part is what a cache starts with
            sources = [source for source in argument_nodes(current) if is_tensor(source) and _has_content(source)]
        elif packet(current) in MOVES or current.target in (aten.linear.default, operator.getitem):
            sources = argument_nodes(current)[:1]
        elif current.target is quarot.dequantize.default and AUTHOR in current.meta:  # an activation, quantised by us
            sources = [argument_nodes(made)[0] for made in _operators_on_codes(current)]
        else:
            origins[current] = None
            continue
        if current not in passed:
            passed[current] = None
            pending += sources
    return list(passed), list(origins)


def _has_content(node: fx.Node) -> bool:
    return packet(node) not in UNFILLED and 0 not in value(node).shape


def _transforms(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    return (node for node in nodes if node.target is quarot.rotate.default)


def _operators_on_codes(dequantize: fx.Node) -> Iterator[fx.Node]:
    """Yield what quantised or unpacked the codes that a node reads, through whatever moves them."""
    pending, seen = [argument_nodes(dequantize)[0]], set[fx.Node]()
    while pending:
        node = pending.pop(0)
        if node in seen or is_float(node):
            continue
        seen.add(node)
        if node.target in QUANTIZATIONS or node.target is quarot.unpack.default:
            yield node
        if node.target not in QUANTIZATIONS:
            pending += [source for source in node.all_input_nodes if is_tensor(source) or _is_tuple(source)]


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(value(node), tuple | list)
