"""``quarot_fx.absorb_rotations``: rotates the weights of a model that stays an ordinary one, for other runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from quarot_fx.basis.plan import RotationPlan
from quarot_fx.capture import INPUT, Captured
from quarot_fx.checkpoint.skeleton import example_inputs
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.errors import RotationNotAbsorbedError
from quarot_fx.float64 import evaluate, relative_difference, run_in_float64
from quarot_fx.graph import PARAMETER, parameters_of, with_sources
from quarot_fx.inspection import Inputs, capture_one_graph
from quarot_fx.passes.fold_constants import FoldConstants, constants_to_fold
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.program import Program
from quarot_fx.store import WeightStore

TOLERANCE = 1e-9
TRANSPOSITIONS = {"aten.t.default", "aten.transpose.int"}
NEUTRAL = (1.0, 0.0)  # what a gain is once a weight has absorbed it: 1, or 0 where a norm multiplies by 1 + gain


@torch.no_grad()
def absorb_rotations(
    model: torch.nn.Module, inputs: Inputs | None = None, *, rotation: str = "hadamard", seed: int = 0
) -> RotationPlan:
    """Rotate a model's weights in place, as far as that costs nothing: what it computes stays the same, to rounding.

    The residual stream is rotated where all that writes and reads it are weights, which absorb the gains of norms, too.
    No transform runs online, so that the model can be saved, and run or quantised by anything that knows its
    architecture; outliers in the stream are gone, those within a layer are not.

    Args:
        model: an ``nn.Module`` in evaluation mode. It has to trace to one graph.
        inputs: example inputs, as for :func:`quarot_fx.rewrite`; not needed for causal language models of transformers.
        rotation: ``"hadamard"``, with random signs, or ``"random"``, any orthogonal matrix.
        seed: of the randomness.

    Returns:
        the plan; ``plan.sites`` says of every linear layer whether its input is rotated, and why not.

    Raises:
        RotationNotAbsorbedError: the weights alone cannot absorb the rotation; the model is as it was. The message says
            what would have to run online, or what another parameter would be needed for.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    examples = example_inputs(model) if inputs is None else [inputs]
    if not examples:
        raise RotationNotAbsorbedError(reason="its graph is not known", remedy="Give example inputs.")
    captured, arguments = capture_one_graph(model, examples[0])
    captured.check_has_data(arguments)
    config = QuarotConfig(
        a_bits=UNQUANTIZED_BITS,
        kv_bits=UNQUANTIZED_BITS,
        rotation=rotation,
        seed=seed,
        stop_after="rotate",
        disabled_passes=("split-packed-linears",),  # parts are no parameters
    )
    passes = [one for one in build_pipeline(config) if not isinstance(one, FoldConstants)]
    program = run_pipeline(captured.bind(arguments, WeightStore()), passes)
    assert program.plan is not None
    _check_absorbed(program)
    absorbed, emptied = _absorbed(program)
    _fill_neutral(captured, arguments, absorbed, emptied)
    for place, name in captured.parameters.items():
        if name in absorbed and id(arguments[place]) in names:
            arguments[place].copy_(absorbed[name])
    return program.plan


def _check_absorbed(program: Program) -> None:
    plan = program.plan
    assert plan is not None
    if plan.online:
        first = plan.online[0]
        raise RotationNotAbsorbedError(
            reason=f"{first.where} needs {first.rotation} online: {first.why}", remedy=_REMEDY
        )
    if not any(site.rotated == "free" for site in plan.sites):
        site = next((site for site in plan.sites if site.why), None)
        why = f"; {site.name}, for one: {site.why}" if site else ""
        raise RotationNotAbsorbedError(
            reason=f"no linear layer's input can be rotated for nothing{why}", remedy=_REMEDY
        )


def _absorbed(program: Program) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the new values of parameters, in float64, and the names of those that others absorbed, to be filled."""
    values: dict[str, torch.Tensor] = {}
    consumed: dict[str, torch.Tensor] = {}
    stored = {node.meta[PARAMETER]: node for node in program.graph.find_nodes(op="get_attr") if PARAMETER in node.meta}
    for node in constants_to_fold(program.graph):
        name, *others = parameters_of(node)
        value = _as_stored(node)
        if name in values:
            reason = f"{name} is read in two places, which want it in two forms: is it tied?"
            raise RotationNotAbsorbedError(reason=reason, remedy="Untie it: give each place a parameter of its own.")
        if value.shape != stored[name].meta["val"].shape:
            reason = f"{_layer(node)} would need a parameter {list(value.shape)} made of {', '.join([name, *others])}"
            raise RotationNotAbsorbedError(reason=reason, remedy=_REMEDY)
        values[name] = value
        consumed |= {other: stored[other].meta["val"] for other in others}
    empty = {name: torch.empty(val.shape, dtype=torch.float64) for name, val in consumed.items() if name not in values}
    return {**values, **empty}, list(empty)


def _as_stored(node: fx.Node) -> torch.Tensor:
    """Return the value of a constant, transposed back if the parameter is read transposed."""
    turns = sum(str(one.target) in TRANSPOSITIONS for one in with_sources(node))
    value = evaluate(node)
    return value.mT if turns % 2 and value.ndim > 1 else value  # a bias may be made of a weight that is read transposed


def _fill_neutral(
    captured: Captured, arguments: Sequence[Any], absorbed: Mapping[str, torch.Tensor], emptied: Sequence[str]
) -> None:
    """Fill the parameters that others absorbed with the number that leaves the original graph's output as it was."""
    expected = _run(captured, arguments, {})
    for number in NEUTRAL:
        for name in emptied:
            absorbed[name].fill_(number)
        difference = relative_difference(_run(captured, arguments, absorbed), expected)
        if difference < TOLERANCE:
            return
    reason = f"with rotated weights its own code computes something else (by {difference:.1e}, relative)"
    raise RotationNotAbsorbedError(reason=reason, remedy=_REMEDY)


def _run(captured: Captured, arguments: Sequence[Any], values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    bound = {
        place: torch.nn.Parameter(values[name].to(arguments[place].device)) if name in values else arguments[place]
        for place, name in captured.parameters.items()
    }
    program = captured.bind(bound, WeightStore())  # type: ignore[arg-type]
    places = [node.meta[INPUT] for node in program.graph.find_nodes(op="placeholder")]
    return run_in_float64(program.graph_module, *[arguments[place] for place in places])


def _layer(node: fx.Node) -> str:
    return next((str(user.name) for user in node.users), node.name)


_REMEDY = "quarot_fx.save keeps what runs online, for torch.compile(model, backend='quarot')."
