"""Which weights a compiled graph computes with. The dangerous step: one Dynamo graph serves every module whose guards
pass, and guards look at neither the identity nor the content of a parameter.

So at every call what arrives is compared with what was bound; where it differs, constants are made for what arrived.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quarot_fx.capture import INPUT, Captured
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import CaptureError
from quarot_fx.lowering.lift import Lifted, lift
from quarot_fx.passes.base import Pass
from quarot_fx.passes.pipeline import run_pipeline
from quarot_fx.store import WeightStore, check_not_updated_after_freeing, free, keep_live, stamp

Compile = Callable[[Lifted], Callable[..., Any]]
_ALIVE: weakref.WeakSet[BoundGraph] = weakref.WeakSet()


@dataclass(frozen=True)
class Binding:
    """The constants that were made from one set of parameters.

    Attributes:
        parts: place among the arguments, parameter and version of everything that went into a constant.
        live: place and parameter of what the compiled graph reads as it is.
        constants: in the order in which the compiled graph takes them.
    """

    parts: tuple[tuple[int, weakref.ref[torch.Tensor], tuple[int, int]], ...]
    live: tuple[tuple[int, weakref.ref[torch.Tensor]], ...]
    constants: tuple[torch.Tensor, ...]

    def fits(self, arguments: Sequence[Any]) -> bool:
        """Whether these arguments carry the parameters, unchanged, that the constants were made from."""
        return all(
            arguments[place] is parameter() and stamp(arguments[place]) == bound
            for place, parameter, bound in self.parts
        )

    def parameters(self) -> dict[int, torch.Tensor]:
        """Return the parameters that are still there, by their place among the arguments."""
        references = [(place, parameter) for place, parameter, _ in self.parts] + list(self.live)
        found = {place: parameter() for place, parameter in references}
        return {place: parameter for place, parameter in found.items() if parameter is not None}

    def is_stale(self) -> bool:
        """Whether no call can fit any more: a parameter is gone or was changed."""
        return any((tensor := parameter()) is None or stamp(tensor) != bound for _, parameter, bound in self.parts)


class BoundGraph:
    """What the backend returns to Dynamo: a compiled graph, and the constants for every set of weights it has met.

    Args:
        captured: the graph before any weight is bound.
        config: ``free_originals`` releases a parameter once nothing but constants made from it is needed; ``check``
            runs every exact pass against the stage before, on the first arguments.
        passes: the pipeline.
        store: of constants, shared with other graphs.

    Attributes:
        captured, config: as given.
    """

    def __init__(self, captured: Captured, config: QuarotConfig, passes: Sequence[Pass], store: WeightStore) -> None:
        self.captured, self.config = captured, config
        self._passes, self._store = passes, store
        self._bindings: list[Binding] = []
        _ALIVE.add(self)

    def compile(self, arguments: Sequence[Any], compile_lifted: Compile) -> None:
        """Rewrite the graph with the first set of weights and compile it."""
        lifted = self._bind(arguments)
        self._form, self._places = lifted.form, lifted.places
        self._run = compile_lifted(lifted)

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled graph with the constants that belong to the parameters among the arguments."""
        binding = next((b for b in self._bindings if b.fits(arguments)), None)
        if binding is None:
            self._rebind(arguments)
            binding = self._bindings[0]
        with torch.no_grad():
            return self._run(*[arguments[place] for place in self._places], *binding.constants)

    def _rebind(self, arguments: Sequence[Any]) -> None:
        for place in self.captured.parameters:
            check_not_updated_after_freeing(arguments[place])
        self._bindings = [binding for binding in self._bindings if not binding.is_stale()]
        if self._bind(arguments).form != self._form:
            raise CaptureError(
                where="new weights in a compiled graph",
                reason="the graph is rewritten differently for them; call torch.compiler.reset()",
            )

    def _bind(self, arguments: Sequence[Any]) -> Lifted:
        self.captured.check_has_data(arguments)
        bound = self.captured.bind(arguments, self._store)
        if self.config.free_originals:
            names = {id(arguments[place]): name for place, name in self.captured.parameters.items()}
            bound.release = partial(_free_parameters, names)
        program = run_pipeline(bound, self._passes, self._inputs(arguments) if self.config.check else None)
        lifted = lift(program.graph_module)
        consumed = {
            place: arguments[place] for place in self.captured.parameters if id(arguments[place]) in program.consumed
        }
        for place in self.captured.parameters:
            if place in lifted.places:
                keep_live(arguments[place])
        parts = tuple((place, weakref.ref(p), stamp(p)) for place, p in consumed.items())
        live = tuple(
            (place, weakref.ref(arguments[place])) for place in self.captured.parameters if place not in consumed
        )
        self._bindings.insert(0, Binding(parts, live, lifted.constants))
        return lifted

    def bound_parameters(self) -> list[dict[int, torch.Tensor]]:
        """Return every set of parameters that the graph computes with, by their place among the arguments."""
        return [binding.parameters() for binding in self._bindings if not binding.is_stale()]

    def _inputs(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the arguments that are not parameters, in the order of the program's placeholders."""
        nodes = self.captured.graph_module.graph.find_nodes(op="placeholder")
        places = [node.meta[INPUT] for node in nodes]
        return [arguments[place] for place in places if place not in self.captured.parameters]


def _free_parameters(names: Mapping[int, str], tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        if id(tensor) in names:
            free(tensor, names[id(tensor)])


def compiled_graphs() -> list[BoundGraph]:
    """Return the graphs that are compiled in this process and not forgotten yet."""
    return list(_ALIVE)
