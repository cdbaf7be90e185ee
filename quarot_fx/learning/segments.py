"""Where a graph is cut into pieces between which few values pass: a residual stream, if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from quarot_fx.graph import numel_hint, value

NODES = 64  # in a piece, about: a layer of a decoder


def segments(
    nodes: Sequence[fx.Node], sources: Callable[[fx.Node], Iterable[fx.Node]], kept: Iterable[fx.Node]
) -> list[list[fx.Node]]:
    """Return nodes, in order, in pieces of about ``NODES``, cut where the values that pass take least memory.

    Args:
        nodes: what is computed.
        sources: of a node, the nodes that it is computed from.
        kept: the nodes that are read at the end.
    """
    places = {node: place for place, node in enumerate(nodes)}
    last = dict.fromkeys(places, -1)
    for node in nodes:
        last.update({source: places[node] for source in sources(node) if source in places})
    last.update(dict.fromkeys(kept, len(nodes)))
    passing = [0] * (len(nodes) + 1)  # bytes that pass before each place
    for node, place in places.items():
        for between in range(place + 1, min(last[node], len(nodes)) + 1):
            passing[between] += _bytes(node)
    count = max(1, len(nodes) // NODES)
    borders = [len(nodes) * (2 * k + 1) // (2 * count) for k in range(count)]  # one cut between each two of these
    cuts = [min(range(a, b), key=passing.__getitem__) for a, b in pairwise(borders)]
    return [list(nodes[a:b]) for a, b in zip([0, *cuts], [*cuts, len(nodes)], strict=True)]


def _bytes(node: fx.Node) -> int:
    tensors = [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, Tensor)]
    return sum(numel_hint(tensor.shape) * tensor.itemsize for tensor in tensors)
