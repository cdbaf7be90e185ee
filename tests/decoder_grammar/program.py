"""A drawn program: layers between a beginning and an end, with weights; and its capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from captures import epilogue, trace
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F

from decoder_grammar.grammar import Step, steps
from decoder_grammar.scope import Scope, Sizes
from decoder_grammar.symbols import Layer, Linear, Norm
from quarot_fx.capture import INPUT, Captured
from quarot_fx.functionalize import functionalize
from quarot_fx.legalize import legalize
from quarot_fx.program import Program as Bound
from quarot_fx.program import copy_graph_module
from quarot_fx.store import WeightStore

Begin = Literal["input", "embedding", "scaled embedding", "weight"]
End = Literal["norm and head", "tied head", "stream", "stream and head"]
VOCABULARY = 7


@dataclass(frozen=True)
class Program:
    """A tree of productions.

    Attributes:
        sizes: of its axes.
        dtype: of weights and inputs; in float64 the stored constants are exact too.
        seed: of the values of weights and inputs.
        dynamic: whether all axes of inputs but the last are of unknown size when the program is captured.
        begin: what the residual stream is at first.
        layers: what it goes through.
        final_norm, head, end: how it ends.
    """

    sizes: Sizes
    dtype: torch.dtype
    seed: int
    dynamic: bool
    begin: Begin
    layers: list[Step]
    final_norm: Step
    head: Step
    end: End

    def run(self, m: Scope) -> list[Tensor]:
        """Compute the outputs; ``m`` has the tensors."""
        s = self.sizes
        if self.begin == "input":
            x = m.input(s.batch, s.tokens, s.hidden)
            x = x * 1
        elif self.begin == "weight":  # learnt tokens
            x = m.weight(1, s.tokens, s.hidden).expand(s.batch, -1, -1) + m.input(s.batch, s.tokens, 1)
        else:
            x = F.embedding(m.ids(VOCABULARY, s.batch, s.tokens), m.weight(VOCABULARY, s.hidden))
            x = x * s.hidden**0.5 if self.begin == "scaled embedding" else x
        for layer in self.layers:
            x = layer(m, x)
        outputs = [x] if self.end in ("stream", "stream and head") else []
        if self.end != "stream":
            y = self.final_norm(m, x)
            outputs.append(
                F.linear(y, m.tied(VOCABULARY, s.hidden)) if self.end == "tied head" else self.head(m, y, VOCABULARY)
            )
        return outputs + m.outputs

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and inputs by name, as they are before the program runs."""
        m = Scope(self.sizes, self.dtype, self.seed)
        with torch.no_grad():
            self.run(m)
        return m.made

    def capture(self) -> Capture:
        """Trace the program as the backend does."""
        made = self.tensors()

        def function(*tensors: Tensor) -> list[Tensor]:
            return self.run(Scope(self.sizes, self.dtype, given=dict(zip(made, tensors, strict=True))))

        mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
        fakes = [
            mode.from_tensor(tensor, symbolic_context=_unknown_sizes(tensor))
            if self.dynamic and not name.startswith("weight")
            else mode.from_tensor(tensor, static_shapes=True)
            for name, tensor in made.items()
        ]
        return Capture(trace(function, fakes), made)


class Module(nn.Module):
    """A program with its weights as parameters; takes its inputs by name."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for name, tensor in program.tensors().items():
            if name.startswith("weight"):
                setattr(self, name, nn.Parameter(tensor) if tensor.is_floating_point() else nn.Buffer(tensor))

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        given = {**self._parameters, **self._buffers, **inputs}
        return self.program.run(Scope(self.program.sizes, self.program.dtype, given=given))


def _unknown_sizes(tensor: Tensor) -> StatelessSymbolicContext[Any, Any]:
    known = [DimDynamic.STATIC] if tensor.is_floating_point() else [DimDynamic.DYNAMIC]
    return StatelessSymbolicContext([DimDynamic.DYNAMIC] * (tensor.ndim - 1) + known)


@dataclass(frozen=True)
class Capture:
    """A program's graph, as the tracer made it.

    Attributes:
        graph_module: not functional yet; its placeholders are weights and inputs in the order of ``tensors``.
        tensors: name -> value of every weight and input.
    """

    graph_module: fx.GraphModule
    tensors: dict[str, Tensor]

    def bound(self) -> Bound:
        """Return the functional graph with its weights, as the backend hands it to the passes."""
        module = copy_graph_module(self.graph_module)
        functionalize(module)
        legalize(module.graph)
        written = {node.args[0] for node in epilogue(module)}
        parameters = {}
        for place, (name, node) in enumerate(zip(self.tensors, module.graph.find_nodes(op="placeholder"), strict=True)):
            node.meta[INPUT], node._dynamo_source = place, None
            node._rename(name)
            node.target = node.name
            if name.startswith("weight") and node not in written:
                parameters[place] = name
        tensors = [tensor.clone() for tensor in self.tensors.values()]
        return Captured(module, parameters).bind(tensors, WeightStore())


# -- the strategy ----------------------------------------------------------------------------------

SIZES = st.builds(
    Sizes,
    batch=st.sampled_from([2, 1, 3, 4]),
    tokens=st.sampled_from([3, 1, 2, 4, 6, 8]),
    hidden=st.sampled_from([8, 4, 6, 12, 16]),
    inner=st.sampled_from([12, 4, 8, 16]),
    kv_heads=st.sampled_from([2, 1, 3, 4]),
    repeats=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 2, 6, 8]),
)


def programs(max_layers: int = 5) -> st.SearchStrategy[Program]:
    """Return the strategy of programs."""
    return st.builds(
        Program,
        sizes=SIZES,
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        seed=st.integers(0, 9),
        dynamic=st.sampled_from([False, False, True]),
        begin=st.sampled_from(get_args(Begin)),
        layers=st.lists(steps(Layer), min_size=1, max_size=max_layers),
        final_norm=steps(Norm),
        head=steps(Linear),
        end=st.sampled_from(get_args(End)),
    )
