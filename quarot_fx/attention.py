"""Attention in its spellings: where keys and values are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from quarot_fx.graph import Constants, argument_nodes, is_tensor
from quarot_fx.ops import attend_packed
from quarot_fx.ops.declaration import reference_of

aten = torch.ops.aten
FUSED = "aten.scaled_dot_product_attention.default"
PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default")
SOFTMAX = ("aten.softmax.int", "aten._softmax.default", "aten._safe_softmax.default")
ATTENTION = "quarot_attention"  # node.meta[ATTENTION]: the name of the attention that an op stands for
QUANTIZED = "quarot_quantized"  # node.meta[QUANTIZED]: "key" or "value" -> how what a node reads was Quantized
REACH = 16  # operators between the scores and the softmax (scale, cap, mask, casts), or after it, at most


@dataclass(frozen=True)
class Quantized:
    """How keys or values were quantised before they are read.

    Attributes:
        bits: of a code.
        by: ``"cache"``, the caller's, which holds codes; or ``"simulation"``, at every read.
    """

    bits: int
    by: str


@dataclass(frozen=True)
class Read:
    """A read of keys or values by a product.

    Attributes:
        kind: ``"key"`` or ``"value"``.
        user: the node that reads.
        place: among the user's argument nodes.
        dim: the axis that is head_dim there, negative.
    """

    kind: str
    user: fx.Node
    place: int
    dim: int

    @property
    def tensor(self) -> fx.Node:
        """What is read."""
        return argument_nodes(self.user)[self.place]

    @property
    def name(self) -> str:
        """Name of the node that reads, or of the one that it stands for, as the rotation plan knows it."""
        return str(self.user.meta.get(ATTENTION, self.user.name))

    @property
    def quantized(self) -> Quantized | None:
        """How what is read was quantised, as :meth:`note` noted it."""
        found: Quantized | None = self.user.meta.get(QUANTIZED, {}).get(self.kind)
        return found

    def note(self, quantized: Quantized) -> None:
        """Note how what is read was quantised."""
        self.user.meta[QUANTIZED] = {**self.user.meta.get(QUANTIZED, {}), self.kind: quantized}


def stand_for(fused: fx.Node, attention: fx.Node) -> None:
    """Let a node be read as the attention that it replaces."""
    fused.meta[ATTENTION] = attention.meta.get(ATTENTION, attention.name)
    if QUANTIZED in attention.meta:
        fused.meta[QUANTIZED] = attention.meta[QUANTIZED]


def reads_codes(attention: fx.Node) -> bool:
    """Whether an attention takes codes, scale and zero point of keys, and then of values."""
    return bool(reference_of(attention.target) is attend_packed)


def reads_of_keys_and_values(graph: fx.Graph) -> Iterator[Read]:
    """Yield the reads of keys and values of every attention: fused, or a softmax between two products."""
    constants = Constants(graph)
    for node in graph.nodes:
        if str(node.target) == FUSED or ATTENTION in node.meta:
            yield Read("key", node, 1, -1)
            yield Read("value", node, 4 if reads_codes(node) else 2, -1)
        elif str(node.target) in SOFTMAX:
            scores = _back_to_product(node, constants)
            mix = _on_to_product(node, constants)
            if scores is not None and mix is not None:
                yield Read("key", scores, len(_operands(scores)) - 1, -2)
                yield Read("value", mix, len(_operands(mix)) - 1, -1)


def before_repetition(read: Read) -> tuple[fx.Node, int]:
    """Follow a read back through the repetition of heads (and transposes) to where each head exists once.

    Returns:
        the user and the place where the unrepeated tensor, head_dim last, is read; the read itself if none is.
    """
    user, place, dim = read.user, read.place, read.dim
    best: tuple[fx.Node, int] | None = (user, place) if dim == -1 else None
    while True:
        node = argument_nodes(user)[place]
        step = _through(node, dim)
        if step is None or len(node.users) != 1:
            return best if best is not None else (read.user, read.place)
        user, place, dim = node, 0, step
        if dim == -1:
            best = (user, place)


def _through(node: fx.Node, dim: int) -> int | None:
    """Where head_dim is in a view's source, or None if the node is anything but a repetition or a move of axes."""
    target = str(node.target)
    source = argument_nodes(node)[0] if argument_nodes(node) else None
    if source is None or not is_tensor(source):
        return None
    shape, origin = node.meta["val"].shape, source.meta["val"].shape
    if target == "aten.transpose.int":
        first, second = (int(d) % len(shape) - len(shape) for d in node.args[1:3])  # type: ignore[arg-type]
        return {first: second, second: first}.get(dim, dim)
    if target == "aten.permute.default":
        return int(node.args[1][dim]) % len(shape) - len(shape)  # type: ignore[index,arg-type]
    keeps = ("aten.expand.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.reshape.default",
             "aten.view.default", "aten.repeat_interleave.self_int", "aten.contiguous.default",
             "aten.clone.default")  # fmt: skip
    if target in keeps and dim == -1 and shape[-1] == origin[-1] and len(origin) >= 3:
        return -1
    return None


def _operands(product: fx.Node) -> list[fx.Node]:
    return argument_nodes(product)


def _is_product(node: fx.Node, constants: Constants) -> bool:
    return str(node.target) in PRODUCTS and not any(operand in constants for operand in _operands(node)[-2:])


def _back_to_product(softmax: fx.Node, constants: Constants) -> fx.Node | None:
    frontier = [softmax]
    for _ in range(REACH):
        frontier = [s for node in frontier for s in node.all_input_nodes if is_tensor(s) and s not in constants]
        found = [node for node in frontier if _is_product(node, constants)]
        if found:
            return found[0]
    return None


def _on_to_product(softmax: fx.Node, constants: Constants) -> fx.Node | None:
    frontier = [softmax]
    for _ in range(REACH):
        users = [user for node in frontier for user in node.users if user.op == "call_function"]
        for user in users:
            if _is_product(user, constants) and _operands(user)[-2] in frontier:
                return user
        frontier = [user for user in users if is_tensor(user) and user.meta["val"].dtype.is_floating_point]
    return None
