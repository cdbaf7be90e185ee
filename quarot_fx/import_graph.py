"""From an FX graph or an exported program to ours: whoever traced it, and with whatever operators it was written.

A graph may come from ``torch.export``, from ``make_fx`` before or after dispatch, from ``torch.fx.symbolic_trace``, or
be what Dynamo gives a backend. It is traced once more, with its own modules run on fake values, so that all of these
end in the same form.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves

from quarot_fx.aliasing import argument
from quarot_fx.capture import INPUT, Captured, capture, trace
from quarot_fx.errors import GraphInputError, TrainingModeError
from quarot_fx.graph import PARAMETER, module_path
from quarot_fx.meta import fake_on
from quarot_fx.program import copy_graph_module

DROPOUTS = {"aten.dropout.default", "aten.native_dropout.default"}


def import_graph(
    source: fx.GraphModule | ExportedProgram, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[Captured, Sequence[Any]]:
    """Bring a graph into our form.

    Args:
        source: it stays as it is. Tensors that it stores keep their names and their identity; those that it writes,
            such as caches, stay part of it and are not constant.
        args: example inputs, as ``forward`` takes them. An exported program has its own. Other graphs need them only
            if their placeholders have no fake values; symbolic sizes of fake values stay symbolic.
        kwargs: example inputs by name.

    Returns:
        the captured graph, and its arguments: example inputs as far as they are known, then what the graph stores.

    Raises:
        GraphInputError: example inputs are missing or do not fit.
        TrainingModeError: dropout is active in it.
        CaptureError: it cannot be traced.
    """
    if isinstance(source, ExportedProgram):
        if not args and not kwargs and source.example_inputs is not None:
            args, kwargs = source.example_inputs
        source = source.module(check_guards=False)
        assert isinstance(source, fx.GraphModule)
    if any("grapharg" in node.meta for node in source.graph.find_nodes(op="placeholder")):  # Dynamo's
        return capture(source, args), list(args)
    module = copy_graph_module(source)
    _drop_guards(module)
    stored = _stored_tensors(module)
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    examples = _examples(source, placeholders, args, kwargs or {})
    fake_mode, values = _fake_values(placeholders, examples)
    fakes = [fake_mode.from_tensor(tensor, static_shapes=True) for tensor in stored.values()]

    def run(*everything: Any) -> Any:
        inputs, tensors = everything[: len(values)], everything[len(values) :]
        with _reparametrize_module(module, dict(zip(stored, tensors, strict=True)), tie_weights=True):
            return fx.Interpreter(module).run(*inputs, enable_io_processing=False)

    graph_module = trace(run, [*values, *fakes])
    names = [str(node.target) for node in placeholders] + [_name(module, name) for name in stored]
    for place, (node, name) in enumerate(zip(graph_module.graph.find_nodes(op="placeholder"), names, strict=True)):
        node.meta[INPUT] = place
        if place < len(placeholders):
            node._rename(name)
            node.target = node.name
    graph_module.recompile()
    _check_evaluation_mode(graph_module)
    return Captured(graph_module, dict(list(enumerate(names))[len(values) :])), [*examples, *stored.values()]


def _drop_guards(module: fx.GraphModule) -> None:
    """Remove what checks that inputs are as they were when the graph was exported."""
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
        module.graph.erase_node(node)


def _stored_tensors(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that a graph reads, itself or through modules that it calls, each once."""
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in tensors if name in read or any(_parents(name, read))}


def _parents(name: str, modules: set[str]) -> Iterator[str]:
    parts = name.split(".")
    yield from ({".".join(parts[:end]) for end in range(1, len(parts))} & modules)


def _name(module: fx.GraphModule, target: str) -> str:
    """Return the name that a stored tensor has in the user's model, if a graph of ours was rewritten before."""
    nodes = module.graph.find_nodes(op="get_attr", target=target)
    return next((node.meta[PARAMETER] for node in nodes if PARAMETER in node.meta), target)


def _examples(
    source: fx.GraphModule, placeholders: list[fx.Node], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return example inputs in the order of the placeholders; none if there are none."""
    if not args and not kwargs:
        return [node.args[0] if node.args else None for node in placeholders]
    try:
        bound = inspect.signature(source.forward).bind(*args, **kwargs)
        bound.apply_defaults()
    except TypeError as error:
        raise GraphInputError(reason=str(error), remedy="Give example inputs as its forward takes them.") from error
    leaves = tree_leaves(list(bound.arguments.values()))
    if len(leaves) != len(placeholders):
        raise GraphInputError(
            reason=f"it takes {len(placeholders)} inputs ({', '.join(map(str, placeholders))}), not {len(leaves)}",
            remedy="Give example inputs as its forward takes them.",
        )
    return leaves


def _fake_values(placeholders: list[fx.Node], examples: list[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Return what to trace with: the graph's own fake values where all inputs have them, else fakes of the examples."""
    values = [node.meta.get("val", example) for node, example in zip(placeholders, examples, strict=True)]
    for node, val in zip(placeholders, values, strict=True):
        if val is None and "val" not in node.meta and not node.args:
            raise GraphInputError(
                reason=f"nothing tells the shape of its input {node.name!r}",
                remedy="Give example inputs, or a graph from torch.export, whose nodes have fake values.",
            )
    modes = {id(val.fake_mode): val.fake_mode for val in values if isinstance(val, FakeTensor)}
    fake_mode = next(iter(modes.values())) if len(modes) == 1 else FakeTensorMode(allow_non_fake_inputs=True)
    # Tracing real tensors gives each a mode of its own, and modes do not mix.
    return fake_mode, [_fake(val, fake_mode) if isinstance(val, torch.Tensor) else val for val in values]


def _fake(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is fake_mode:
        return tensor
    return fake_on(tensor, tensor.device, fake_mode)


def _check_evaluation_mode(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if str(node.target) in DROPOUTS and argument(node, "train"):
            raise TrainingModeError(where=module_path(node))
