"""The model to calibrate as programs: rotated, and quantised besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from quarot_fx.capture import INPUT
from quarot_fx.config import SEARCHED_CLIPS, QuantScheme, QuarotConfig
from quarot_fx.errors import CalibrationDataError
from quarot_fx.inspection import capture_one_graph
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline, split_at_quantization
from quarot_fx.passes.quantized import quantized_activation
from quarot_fx.program import Program
from quarot_fx.store import SHARED


@dataclass(frozen=True)
class Programs:
    """One model twice; nodes of the rotated program have the same names in the other one.

    Attributes:
        rotated: in rotated bases, nothing quantised.
        quantized: quantised besides, or some of it; codes of weights may still be to be found.
        searched: name of a linear layer -> how its input is quantised, with a clip ratio that is to be searched for.
        tokens: place of the token ids among the arguments.
        arguments: by place; the inputs that are not token ids are the same for all sequences.
    """

    rotated: Program
    quantized: Program
    searched: Mapping[str, QuantScheme]
    tokens: int
    arguments: tuple[Any, ...]

    def quantized_by(self, config: QuarotConfig, without: tuple[type[Pass], ...] = ()) -> Programs:
        """Return the model quantised in another way, ``without`` what some passes quantise."""
        provisional = config.with_provisional_clips()
        _, quantizing = split_at_quantization(build_pipeline(provisional))
        quantized = run_pipeline(self.rotated, [one for one in quantizing if not isinstance(one, without)])
        searched: dict[str, QuantScheme] = {}
        if provisional != config:  # some ratio is to be found: where inputs are quantised shows in the whole program
            whole = run_pipeline(self.rotated, quantizing) if without else quantized
            searched = dict(_searched_inputs(whole.graph, config))
        return replace(self, quantized=quantized, searched=searched)

    def inputs(self, program: Program) -> Mapping[fx.Node, Any]:
        """Return the values of a program's placeholders, token ids included."""
        return {node: self.arguments[node.meta[INPUT]] for node in program.graph.find_nodes(op="placeholder")}

    def token_input(self, program: Program) -> fx.Node:
        """Return a program's placeholder of token ids."""
        placeholders = program.graph.find_nodes(op="placeholder")
        return next(node for node in placeholders if node.meta[INPUT] == self.tokens)


def capture_programs(
    model: Callable[..., Any], example: Tensor, config: QuarotConfig, without: tuple[type[Pass], ...] = ()
) -> Programs:
    """Capture a model on token ids [batch, length], and rewrite it as the backend does, up to its quantisation.

    Args:
        model: what to capture.
        example: the token ids.
        config: of the rewriting.
        without: passes that quantise and are left out.

    Raises:
        CalibrationDataError: the model does not read the token ids.
        NotOneGraphError, UnboundParameterError: as :func:`quarot_fx.rewrite`.
    """
    captured, arguments = capture_one_graph(model, example)
    captured.check_has_data(arguments)
    tokens = next((place for place, argument in enumerate(arguments) if argument is example), None)
    if tokens is None:
        remedy = "Give a model whose forward takes token ids first."
        raise CalibrationDataError(reason="the model's graph does not read the token ids", remedy=remedy)
    before, _ = split_at_quantization(build_pipeline(config.with_provisional_clips()))
    rotated = run_pipeline(captured.bind(arguments, SHARED), before)
    return Programs(rotated, rotated, {}, tokens, tuple(arguments)).quantized_by(config, without)


def device_of(model: Callable[..., Any]) -> torch.device | None:
    """Return the device of a model's first parameter, and ``None`` if it has none that can be found."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), None)


def _searched_inputs(graph: fx.Graph, config: QuarotConfig) -> Iterator[tuple[str, QuantScheme]]:
    for linear in linear_likes(graph):
        activation = quantized_activation(linear.x)
        if activation is not None and config.for_parameter(linear.parameter).a_clip in SEARCHED_CLIPS["a_clip"]:
            yield linear.node.name, activation.scheme
