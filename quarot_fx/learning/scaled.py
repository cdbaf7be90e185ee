"""A quantised model as a differentiable function of the scales of its weights, next to the float model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from quarot_fx.calibration.calibrated import PackedCodes, remember
from quarot_fx.calibration.programs import Programs
from quarot_fx.config import QuarotConfig
from quarot_fx.graph import argument_nodes, stored_tensor
from quarot_fx.learning.losses import divergence
from quarot_fx.learning.training import network_of
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.quantized import quantization_of, quantized_weight
from quarot_fx.program import Program
from quarot_fx.store import expression

Scales = Mapping[Hashable, Tensor]
"""How a weight's codes are made -> its scales, [..., rows, groups]. Layers that read the same codes share them."""


class ScaledModel:
    """A model whose weights are codes that stay and scales that are given; activations are rounded with a gradient.

    Args:
        programs: the model; codes of its weights are known.
        config: that it was quantised by.
        shape: of token ids, [batch, length].
        recompute: as :class:`~quarot_fx.learning.network.Network` has it.

    Attributes:
        scales: as they were found when weights were rounded; none if no linear layer's weight is quantised.

    Raises:
        NotCalibratedError: the codes of a weight are not known.
        LearningError: the model returns no logits.
    """

    def __init__(self, programs: Programs, config: QuarotConfig, shape: torch.Size, recompute: bool) -> None:
        fold = FoldConstants(replace(config, free_originals=False))  # weights are rotated and packed once for all steps
        self._float, self._quantized = fold(programs.rotated), fold(programs.quantized)  # which own the weights
        self._teacher = network_of(programs, self._float, shape, recompute)
        self._student = network_of(programs, self._quantized, shape, recompute)
        self._keys = {layer: expression(node).key for layer, node in _quantizations(programs.quantized)}
        stored = {linear.node.name: quantized_weight(linear.weight) for linear in linear_likes(self._quantized.graph)}
        self._weights = {layer: weight for layer, weight in stored.items() if weight is not None}
        self.scales = {self._keys[layer]: stored_tensor(one.scale).detach() for layer, one in self._weights.items()}

    def divergence(self, scales: Scales, tokens: Tensor) -> Tensor:
        """Return the mean Kullback-Leibler divergence of predictions from the float model's, on ids [batch, length]."""
        (teacher, its_input), (student, token_input) = self._teacher, self._student
        with torch.no_grad():
            expected = teacher({its_input: tokens})
        given = {weight.scale: scales[self._keys[layer]] for layer, weight in self._weights.items()}
        return divergence(student({token_input: tokens, **given}), expected)

    def remember(self, scales: Scales, program: Program) -> None:
        """Keep codes with other scales for a program that quantises the same layers in another way."""
        for layer, quantization in _quantizations(program):
            weight = self._weights[layer]
            packed = stored_tensor(argument_nodes(weight.codes)[0])
            zero = torch.empty(0, dtype=torch.uint8) if weight.zero is None else stored_tensor(weight.zero)
            remember(quantization, PackedCodes(packed.cpu(), scales[self._keys[layer]].cpu(), zero.cpu()))


def _quantizations(program: Program) -> Iterator[tuple[str, fx.Node]]:
    """Yield the linear layers whose weights are quantised, and the nodes that make their codes."""
    for linear in linear_likes(program.graph):
        if (quantization := quantization_of(linear.weight)) is not None:
            yield linear.node.name, quantization
