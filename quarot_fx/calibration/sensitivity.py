"""How much a model's predictions change when the weights of a few layers alone are quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from quarot_fx.calibration.programs import Programs
from quarot_fx.calibration.stream import Stream
from quarot_fx.config import QuarotConfig
from quarot_fx.graph import is_float
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.fold_constants import FoldConstants


class Sensitivity:
    """Measures layers in the order in which a model computes them, each from its input on.

    Args:
        programs: the model; it takes logits to be what it computes last.
        sequences: token ids [n, length].
        config: options of the backend.
        offload: keep values on the CPU while they wait.
    """

    def __init__(self, programs: Programs, sequences: Tensor, config: QuarotConfig, offload: bool) -> None:
        program = FoldConstants(config)(programs.rotated)  # each weight is rotated once, and not in every run
        self._linears = {linear.node.name: linear for linear in linear_likes(program.graph)}
        outputs = program.graph.output_node().all_input_nodes
        self._logits: fx.Node = max(node for node in outputs if is_float(node))
        tokens, inputs = programs.token_input(program), programs.inputs(program)
        self._stream = Stream(program.graph, tokens, sequences.split(1), inputs, [self._logits], offload)
        self._expected = [_log_probabilities(logits) for logits in self._stream.ahead(self._logits, {})]
        self._program = program  # which owns the weights

    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """Return the mean Kullback-Leibler divergence of predictions of next tokens from the float model's, in nats.

        Args:
            weights: name of a linear layer's node -> what stands in the place of its weight. No layer of them comes
                before those of the calls before.
        """
        linears = [self._linears[name] for name in weights]
        self._stream.advance([min(linear.x for linear in linears)])
        replaced = {linear.weight: weights[linear.node.name].to(linear.weight.meta["val"].dtype) for linear in linears}
        return _mean_divergence(self._expected, list(self._stream.ahead(self._logits, replaced)))


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _mean_divergence(expected: Sequence[Tensor], logits: Sequence[Tensor]) -> float:
    changes = [
        torch.nn.functional.kl_div(_log_probabilities(actual), one, log_target=True, reduction="none").sum(-1)
        for actual, one in zip(logits, expected, strict=True)
    ]
    return float(torch.stack([change.double().mean() for change in changes]).mean().clamp_min(0))
