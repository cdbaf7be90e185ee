"""Looking at what the backend does to a model: ``rewrite`` gives the graph, ``explain`` the report."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from quarot_fx.capture import INPUT, Captured, capture, source_name
from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.errors import GraphInputError, NotOneGraphError, QuarotError
from quarot_fx.garbage import collected_rarely
from quarot_fx.import_graph import import_graph
from quarot_fx.meta import StandIns, is_on_meta
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.program import Program
from quarot_fx.report import Report
from quarot_fx.store import SHARED
from quarot_fx.training import check_evaluation_mode

Model = Callable[..., Any] | torch.export.ExportedProgram
Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


def rewrite(model: Model, inputs: Inputs = (), *, stop_after: str | None = None, **options: Any) -> fx.GraphModule:
    """Return the rewritten graph of a model, as the backend would compile it.

    Args:
        model: an ``nn.Module`` or a function of one, which Dynamo traces; or a graph: an exported program or an
            ``fx.GraphModule``, which is taken as it is, symbolic sizes included.
        inputs: example inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. An exported
            program, and a graph with fake values, need none unless ``check=True``. Parameters and inputs may be on the
            meta device: all is planned by shapes, and no constant is computed.
        stop_after: name of the last pass to run; ``"rotate"`` gives an equal model in rotated bases.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`.

    Returns:
        A GraphModule that takes the tensors among the inputs (by the names that ``forward`` gives them) and returns
        the tensors among the outputs as a tuple. ``print_readable()`` shows it as Python; its attribute ``quarot``
        is the :class:`~quarot_fx.report.Report`.

    Raises:
        NotOneGraphError: the model has graph breaks, or no parameters.
        GraphInputError: a graph does not fit its inputs, or stores no weights.
        UnboundParameterError: with ``check=True``, a parameter is on the meta device.
    """
    config = QuarotConfig.from_options({**options, **({"stop_after": stop_after} if stop_after else {})})
    program = _rewritten(model, inputs, config)
    program.graph_module.quarot = cover(program)  # type: ignore[assignment]
    return program.graph_module


def explain(model: Model, inputs: Inputs = (), **options: Any) -> Report:
    """Return what the backend does to a model: every pass, the rotation plan, every linear layer and cache.

    Takes the arguments of :func:`rewrite`. Runs every stage against the one before in float64, to report the largest
    difference, if the model has weights; ``check=False`` saves that time.
    """
    return cover(_rewritten(model, inputs, QuarotConfig.from_options({"check": not is_on_meta(model), **options})))


def _rewritten(model: Model, inputs: Inputs, config: QuarotConfig) -> Program:
    passes = build_pipeline(config)
    program, arguments = bound_program(model, inputs, needs_data=config.check)
    return run_pipeline(program, passes, arguments if config.check else None)


def bound_program(model: Model, inputs: Inputs, *, needs_data: bool) -> tuple[Program, list[Any]]:
    """Return a model as a program that no pass has run on, and the arguments of its placeholders.

    Args:
        model: as :func:`rewrite` takes it.
        inputs: likewise.
        needs_data: refuse parameters that have only shapes.

    Raises:
        NotOneGraphError, GraphInputError, UnboundParameterError: as :func:`rewrite`.
    """
    if isinstance(model, fx.GraphModule | torch.export.ExportedProgram):
        captured, arguments = import_graph(model, *_as_given(inputs))
        if not captured.parameters:
            remedy = "Weights that come as inputs are not known to be any: give the exported program or the module."
            raise GraphInputError(reason="it stores no weights", remedy=remedy)
    else:
        captured, arguments = capture_one_graph(model, inputs)
    if needs_data:
        captured.check_has_data(arguments)
    program = captured.bind(arguments, SHARED)
    places = [node.meta[INPUT] for node in program.graph.find_nodes(op="placeholder")]
    return program, [arguments[place] for place in places]


class _Collected(BaseException):
    """Ends the call of a model when its only graph has been collected: neither guards nor results are wanted."""


def capture_one_graph(model: Callable[..., Any], inputs: Inputs) -> tuple[Captured, Sequence[Any]]:
    """Capture the graph that Dynamo makes of a model, and the arguments that it is called with.

    Raises:
        NotOneGraphError: there is more than one graph with parameters, or none.
    """
    found = capture_graphs(model, inputs)
    if len(found) != 1:
        hint = "Compile it with backend='quarot', which takes any number; torch._dynamo.explain tells why it breaks."
        if not found:
            hint = "Give a model whose forward uses its parameters."
        raise NotOneGraphError(count=len(found), hint=hint)
    return found[0]


@collected_rarely()
def capture_graphs(model: Callable[..., Any], inputs: Inputs) -> list[tuple[Captured, Sequence[Any]]]:
    """Capture all graphs with parameters that Dynamo makes of a model, with the arguments that each is called with."""
    found: list[tuple[Captured, Sequence[Any]]] = []
    errors: list[QuarotError] = []
    stand_ins = StandIns()

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            check_evaluation_mode(gm)
            captured = capture(gm, example_inputs)
            _name_inputs(captured.graph_module)
            if captured.parameters:
                found.append((captured, [stand_ins.original(argument) for argument in example_inputs]))
        except QuarotError as error:
            errors.append(error)
        return gm.forward

    def collect_all(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        collect(gm, example_inputs)
        raise _Collected

    args, kwargs = _arguments(model, inputs)
    without_limits = torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16)
    with torch.no_grad(), without_limits, _uncompiled(model):
        try:
            stand_ins.call(torch.compile(model, backend=collect_all, dynamic=False, fullgraph=True), args, kwargs)
        except _Collected:
            pass
        except Exception:  # there is more than one graph, or none
            found.clear()
            errors.clear()
            stand_ins.call(torch.compile(model, backend=collect, dynamic=False), args, kwargs)
    if errors:
        raise errors[0]
    return found


@contextmanager
def _uncompiled(model: Callable[..., Any]) -> Iterator[None]:
    """Let modules that ``module.compile()`` was called on run as they are: they would call what was compiled."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    compiled = {module: module._compiled_call_impl for module in modules if module._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _arguments(model: Callable[..., Any], inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs by name where forward has names for them, so that the graph's inputs can be called likewise."""
    args, kwargs = _as_given(inputs)
    if kwargs:
        return args, kwargs
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    parameters = list(inspect.signature(forward).parameters.values())[: len(args)]
    if len(parameters) == len(args) and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        return (), {p.name: value for p, value in zip(parameters, args, strict=True)}
    return args, {}


def _as_given(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), {}


def _name_inputs(module: fx.GraphModule) -> None:
    """Name placeholders as forward names them: ``input_ids``, not ``l_kwargs_input_ids_``."""
    for node in module.graph.find_nodes(op="placeholder"):
        if getattr(node, "_dynamo_source", None) is not None:
            words = re.findall(r"\w+", re.sub(r"^[LG]\['(kwargs'\]\[')?", "", source_name(node)))
            node._rename("_".join(words))
            node.target = node.name
    module.recompile()
