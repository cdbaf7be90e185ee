"""From Dynamo's graph to ours: pre-dispatch ATen, functional, with weights told from inputs by where they come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quarot_fx.errors import CaptureError, QuarotError, UnboundParameterError
from quarot_fx.functionalize import functionalize
from quarot_fx.graph import PARAMETER, unused_name
from quarot_fx.legalize import legalize
from quarot_fx.program import Program, copy_graph_module
from quarot_fx.store import WeightStore
from quarot_fx.vmap import write_out_vmaps

INPUT = "quarot_input"  # placeholder.meta[INPUT]: its place among the arguments of the captured graph


@dataclass(frozen=True)
class Captured:
    """A graph in our form, before any weight is bound to it.

    Attributes:
        graph_module: functional ATen graph; its placeholders are Dynamo's, in order, weights included.
        parameters: place of a placeholder -> name of the parameter or buffer that arrives there.
    """

    graph_module: fx.GraphModule
    parameters: dict[int, str] = field(default_factory=dict)

    def bind(self, arguments: Sequence[Any], store: WeightStore) -> Program:
        """Make a program with the given arguments' parameters bound as stored tensors.

        Raises:
            UnboundParameterError: a parameter is quantised already, or an inference tensor.
        """
        module = copy_graph_module(self.graph_module)
        for node in module.graph.find_nodes(op="placeholder"):
            place = node.meta[INPUT]
            if place in self.parameters:
                _check_readable(self.parameters[place], arguments[place])
                _store(module, node, self.parameters[place], arguments[place])
        module.recompile()
        return Program(module, store)

    def check_has_data(self, arguments: Sequence[Any]) -> None:
        """Raise :class:`UnboundParameterError` if a parameter among the arguments is on the meta device."""
        for place, name in self.parameters.items():
            if arguments[place].is_meta:
                remedy = "It can be planned, by quarot_fx.explain or rewrite with check=False; to run it, load weights."
                reason = "is on the meta device and has no data"
                raise UnboundParameterError(parameter=name, reason=reason, remedy=remedy)


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Trace Dynamo's graph to pre-dispatch ATen, where ``linear``, attention and ``silu`` stay whole.

    Dynamo's graph is not touched: it generates the call from that same graph after the backend returns.

    Raises:
        CaptureError: the graph cannot be traced. Dynamo would answer some of the exceptions that cause it with a
            graph break and no message, so none of them gets out.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    values = [node.meta["example_value"] for node in placeholders]
    with _failures_surfacing():
        gm = write_out_vmaps(gm)
    graph_module = trace(fx.Interpreter(gm).run, values)
    graph_module.meta.update(gm.meta)
    written = {node.args[0] for node in graph_module.graph.nodes if node.op == "call_function" and _writes(node)}
    parameters = {}
    for place, (ours, theirs) in enumerate(
        zip(graph_module.graph.find_nodes(op="placeholder"), placeholders, strict=True)
    ):
        ours.meta[INPUT] = place
        ours.meta["tensor_dict"] = theirs.meta.get("tensor_dict", {})
        ours._dynamo_source = getattr(theirs, "_dynamo_source", None)
        if is_parameter(theirs) and isinstance(example_inputs[place], torch.Tensor) and ours not in written:
            parameters[place] = parameter_name(theirs)
    return Captured(graph_module, parameters)


def is_parameter(placeholder: fx.Node) -> bool:
    """Whether what arrives at one of Dynamo's placeholders is a parameter or buffer of a module.

    Told by its source, never by the static-input flag, which the tensors of a static KV cache carry too. Python floats
    of modules, which Dynamo lifts to tensors under dynamic shapes, have a module source but are not parameters.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    argument = placeholder.meta.get("grapharg")
    return (
        source is not None
        and source.guard_source.is_unspecialized_nn_module()
        and argument is not None
        and not argument.pass_arg_as_tensor
    )


def parameter_name(placeholder: fx.Node) -> str:
    """Return a parameter's name in the user's model, such as ``layers.0.mlp.down_proj.weight``."""
    source = source_name(placeholder)
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) or re.sub(r"^[LG]\['\w+'\]\.?", "", source)


def source_name(placeholder: fx.Node) -> str:
    """Return the Python expression that Dynamo reads a placeholder's value from."""
    name = placeholder._dynamo_source.name  # type: ignore[attr-defined]
    return name() if callable(name) else name  # a method until torch 2.12, a property since


def trace(function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """Trace a function of fake values to a graph in our form.

    Raises:
        CaptureError: it cannot be traced.
    """
    fake_modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    fake_mode = fake_modes[0] if fake_modes else FakeTensorMode(allow_non_fake_inputs=True)
    with _failures_surfacing():
        with torch.no_grad(), fake_mode, fx.traceback.preserve_node_meta():
            traced = make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
        functionalize(traced)
        legalize(traced.graph)
        return traced


@contextmanager
def _failures_surfacing() -> Iterator[None]:
    """Turn whatever goes wrong into our error."""
    try:
        yield
    except (QuarotError, RestartAnalysis):  # the latter is Dynamo's own, to trace again
        raise
    except Exception as error:
        raise CaptureError(where=_last_operator(error), reason=f"{type(error).__name__}: {error}") from error


def _last_operator(error: Exception) -> str:
    """Return the operator of the user's graph at which the interpreter failed, from the note that it adds."""
    match = re.search(r"While executing (.+)", str(error))
    return match[1] if match else "tracing"


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _store(module: fx.GraphModule, placeholder: fx.Node, name: str, tensor: torch.Tensor) -> None:
    """Turn a placeholder into a ``get_attr`` of the user's own tensor, which keeps its identity."""
    attribute = unused_name(module, name)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(attribute, tensor)
    else:
        module.register_buffer(attribute, tensor)
    with module.graph.inserting_before(placeholder):
        node = module.graph.get_attr(attribute)
    node.meta = {**placeholder.meta, PARAMETER: name}
    if hasattr(placeholder, "_dynamo_source"):
        node._dynamo_source = placeholder._dynamo_source
    placeholder.replace_all_uses_with(node)
    module.graph.erase_node(placeholder)


def _check_readable(name: str, tensor: torch.Tensor) -> None:
    remedy = "Load the model with real weights in floating point first."
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        reason = f"is a {type(tensor).__name__}: quantised already, or a tensor subclass"
        raise UnboundParameterError(parameter=name, reason=reason, remedy=remedy)
    if tensor.is_inference():
        remedy = "Create or load the model outside of torch.inference_mode(); running it inside is fine."
        reason = "is an inference tensor, whose updates cannot be seen"
        raise UnboundParameterError(parameter=name, reason=reason, remedy=remedy)
