"""``torch.compile(model, backend="quarot")``: the entry point that Dynamo calls, once for every graph of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from quarot_fx.config import QuarotConfig
from quarot_fx.errors import InputRequiresGradError, QuarotError
from quarot_fx.garbage import collected_rarely


def quarot(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one graph of a model to 4 bits.

    Args:
        gm: Dynamo's graph; it stays as it is.
        example_inputs: its arguments, parameters included.
        mode: what the option of that name means, which it overrules.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`.

    Returns:
        A callable with the graph's signature.

    Raises:
        QuarotError: from the call of the model that was being compiled; the next call compiles anew.
    """
    try:
        config = QuarotConfig.from_options({**(options or {}), **({} if mode is None else {"mode": mode})})
        return compile_graph(gm, example_inputs, config)
    except QuarotError as error:
        from quarot_fx.refusal import refusal

        raise refusal(error) from None


@collected_rarely()
def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: QuarotConfig) -> Callable[..., Any]:
    """Capture, rewrite and compile one of Dynamo's graphs."""
    from quarot_fx.binding import BoundGraph
    from quarot_fx.capture import capture, is_parameter
    from quarot_fx.lowering.nested import check_nested_backend, compile_nested
    from quarot_fx.passes.pipeline import build_pipeline
    from quarot_fx.store import SHARED
    from quarot_fx.training import check_evaluation_mode

    check_nested_backend(config.nested_backend, config.mode)
    passes = build_pipeline(config)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    wants_backward = torch.is_grad_enabled()  # what the caller chose; Dynamo guards on it
    for node, example in zip(placeholders, example_inputs, strict=True):
        if wants_backward and isinstance(example, torch.Tensor) and example.requires_grad and not is_parameter(node):
            raise InputRequiresGradError(name=node.name)
    check_evaluation_mode(gm)
    captured = capture(gm, example_inputs)
    graph = BoundGraph(captured, config, passes, SHARED)
    graph.compile(
        example_inputs, lambda lifted: compile_nested(lifted, example_inputs, config.nested_backend, config.mode)
    )
    return graph
