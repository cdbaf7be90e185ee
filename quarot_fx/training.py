"""Whether the modules that a graph was traced from are in training mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator

from quarot_fx.capture import is_parameter, parameter_name, source_name
from quarot_fx.errors import TrainingModeError


def check_evaluation_mode(gm: fx.GraphModule) -> None:
    """Raise :class:`TrainingModeError` if a module whose parameters a graph reads, or one around it, is training.

    Must be called while Dynamo compiles the frame that the graph comes from.
    """
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # not called by Dynamo
        return
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        # What holds buffers only, such as a KV cache that was added after model.eval(), has nothing to train.
        if is_parameter(placeholder) and "._parameters[" in source_name(placeholder):
            root = _root(placeholder, scope)
            *path, _ = parameter_name(placeholder).split(".")
            _check(root, path)


def _root(placeholder: fx.Node, scope: dict[str, Any]) -> Any:
    _, _, rest = source_name(placeholder).partition("L['")
    return scope.get(rest.partition("'")[0])


def _check(module: Any, path: list[str]) -> None:
    if isinstance(module, fx.GraphModule):
        return  # traced already, in whatever mode that was: the flag means nothing
    for depth, name in enumerate(["", *path]):
        module = getattr(module, name, None) if name else module
        if not isinstance(module, torch.nn.Module):
            return
        if module.training:
            raise TrainingModeError(where=".".join(path[:depth]) or f"the {type(module).__name__}")
