"""Linear layers in every spelling: one product of an activation with a constant, contracted over one axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from quarot_fx.graph import Constants, argument_nodes, is_float, is_tensor, leaves_of, main_parameter_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Spelling:
    """Where an operator keeps its operands, as places among its argument nodes, and its weight's axes."""

    x: int
    weight: int
    bias: int | None
    contracted: int
    out: int


PRODUCT = Spelling(x=0, weight=1, bias=None, contracted=-2, out=-1)
SPELLINGS: dict[str, Spelling] = {
    "aten.linear.default": Spelling(x=0, weight=1, bias=2, contracted=-1, out=-2),
    "aten.addmm.default": Spelling(x=1, weight=2, bias=0, contracted=-2, out=-1),
    "aten.baddbmm.default": Spelling(x=1, weight=2, bias=0, contracted=-2, out=-1),
    "aten.matmul.default": PRODUCT,
    "aten.mm.default": PRODUCT,
    "aten.bmm.default": PRODUCT,
    "quarot.expert_linear.default": Spelling(x=0, weight=1, bias=None, contracted=-1, out=-2),
    "aten._grouped_mm.default": PRODUCT,
    "transformers.grouped_mm_fallback.default": PRODUCT,
}

LAYERS = "quarot_layers"  # node.meta[LAYERS]: every Layer that a product of codes stands for


@dataclass(frozen=True)
class Layer:
    """What is to be remembered of a linear layer when its node is gone.

    Attributes:
        node: name of the product that it was, as the rotation plan knows it.
        parameter: the weight's name in the user's model.
        w_bits, a_bits: bits of the weight and of the activation that enters it.
        role: ``"head"`` or ``"router"``, or nothing.
        rounding: of the weight, ``"nearest"``, ``"gptq"`` or ``"tuned"``; nothing if it is left alone.
        a_clip: ratio that the activation is clipped at; ``None`` if it is left alone.
    """

    node: str
    parameter: str
    w_bits: int
    a_bits: int
    role: str
    rounding: str
    a_clip: float | None


@dataclass(frozen=True)
class LinearLike:
    """One linear layer of a graph: ``y = x W + bias``, W contracted with the last axis of x.

    Attributes:
        node: the product.
        spelling: how its operator is written.
    """

    node: fx.Node
    spelling: Spelling

    def _operand(self, place: int | None) -> fx.Node | None:
        operands = argument_nodes(self.node)
        return None if place is None or place >= len(operands) else operands[place]

    @property
    def x(self) -> fx.Node:
        """The activation ``[..., in]``."""
        return argument_nodes(self.node)[self.spelling.x]

    @property
    def weight(self) -> fx.Node:
        """The constant: 2-D, or 3-D with experts in front."""
        return argument_nodes(self.node)[self.spelling.weight]

    @property
    def bias(self) -> fx.Node | None:
        """What is added ``[..., out]``, if anything is."""
        return self._operand(self.spelling.bias)

    @property
    def adds_at_most_a_vector(self) -> bool:
        """Whether the bias, if there is one, is one number for each output: ``addmm`` takes what broadcasts."""
        return self.bias is None or self.bias.meta["val"].shape == (self.weight.meta["val"].shape[self.spelling.out],)

    @property
    def parameter(self) -> str:
        """Name of the weight in the user's model: the largest parameter that the constant depends on."""
        return main_parameter_of(self.weight)


def linear_likes(graph: fx.Graph) -> Iterator[LinearLike]:
    """Yield the linear layers of a graph, in order."""
    constants = Constants(graph)
    for node in graph.nodes:
        spelling = SPELLINGS.get(str(node.target)) if node.op == "call_function" else None
        if spelling is None or node in constants:
            continue
        operands = argument_nodes(node)
        weight, x = operands[spelling.weight], operands[spelling.x]
        is_matrix = weight in constants and is_tensor(weight) and weight.meta["val"].ndim >= 2
        if is_matrix and x not in constants and any(map(is_float, leaves_of(weight))):
            yield LinearLike(node, spelling)
