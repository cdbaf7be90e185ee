"""The compiler that gets the rewritten graph: Inductor, or any backend that torch.compile knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis

from quarot_fx.errors import NestedBackendError, UnknownOptionError
from quarot_fx.lowering.lift import Lifted
from quarot_fx.ops import DECLARATIONS
from quarot_fx.ops.declaration import declaration_of, reference_of

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True},
}

# Kernels of Inductor, like ours, may be started before the one ahead has ended (programmatic dependent launch), where
# the GPU can. Those that do not read each other are one: RoPE of queries and of keys, and the update of a cache.
ON_GPU = {"triton.enable_pdl": True, "combo_kernels": True}


def check_nested_backend(name: str, mode: str | None) -> None:
    """Raise :class:`UnknownOptionError` if there is no such backend or mode; the nearest name is suggested."""
    known = {"eager", *torch._dynamo.list_backends(exclude_tags=())} - {"quarot"}
    if name not in known:
        raise UnknownOptionError("nested_backend", name, known)
    if (mode or "default") not in MODES:
        raise UnknownOptionError("mode", str(mode), MODES)


def compile_nested(lifted: Lifted, arguments: Sequence[Any], name: str, mode: str | None) -> Callable[..., Any]:
    """Compile a lifted graph for inference. Must be called while Dynamo compiles, whose guards it may add to.

    Raises:
        NestedBackendError: it could not. Dynamo would answer some of the exceptions behind it with graph breaks.
    """
    module = lifted.graph_module
    if name == "eager":
        return module.forward
    inputs = lifted.example_inputs(arguments)
    try:
        with torch.no_grad():
            if name == "inductor":
                from torch._inductor.compile_fx import compile_fx

                on_gpu = any(isinstance(one, torch.Tensor) and one.is_cuda for one in inputs)
                patches = MODES[mode or "default"] | (known_to_inductor(ON_GPU) if on_gpu else {})
                decompositions = _decompositions() if on_gpu else None
                register_fallbacks(module.graph)
                compiled: Any = compile_fx(module, inputs, config_patches=patches, decompositions=decompositions)
                return compiled
            compiler: Callable[..., Any] = torch._dynamo.lookup_backend(name)
            return compiler(module, inputs)
    except RestartAnalysis:  # Dynamo's own: it traces again with a lifted float made static
        raise
    except Exception as error:
        raise NestedBackendError(name=name, reason=f"{type(error).__name__}: {error}") from error


def register_fallbacks(graph: torch.fx.Graph) -> None:
    """Tell Inductor of those of our ops that it shall call as they are.

    It does so anyway. But before torch 2.13, where it finds out by itself, it prints the arguments, and all that they
    were computed from, first: a path of the residual stream at a time, of which there are two to the number of layers.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for target in {node.target for node in graph.nodes if node.op == "call_function"}:
        if declaration_of(reference_of(target)) is not None and target not in lowerings:
            make_fallback(target, tag_to_layout_constraint(get_layout_constraint_tag(target)))


def known_to_inductor(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that this version of Inductor has: they only make kernels faster."""
    from torch._inductor import list_options

    known = set(list_options())
    return {name: value for name, value in options.items() if name in known}


def _decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return what Inductor writes operators out as on a GPU: our ops that no kernel runs among them, which it then
    fuses. On the CPU their C++ would take longer to compile than it saves.
    """
    from torch._inductor.decomposition import select_decomp_table

    ours = {one.overload: one.reference for one in DECLARATIONS.values() if one.is_traceable}
    return {**select_decomp_table(), **ours}
