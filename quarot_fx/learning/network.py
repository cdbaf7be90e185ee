"""A program as a differentiable function of its rotations, or of any of its constants, quantised or not.

Graphs are run by what ops declare as their references, so that gradients reach a rotation through every weight that
absorbs it and every activation that is quantised after it. No module is hooked, and no layer known by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from quarot_fx.graph import Constants, stored_tensor
from quarot_fx.learning.precision import is_fast
from quarot_fx.learning.segments import segments
from quarot_fx.learning.straight_through import pass_through, quantize_straight_through
from quarot_fx.ops.declaration import declaration_of
from quarot_fx.passes.quantized import quantization_of, quantized_activation
from quarot_fx.passes.rotate import BASIS
from quarot_fx.rotation import Rotation

quarot = torch.ops.quarot
SDPA = torch.ops.aten.scaled_dot_product_attention.default

Values = dict[fx.Node, Any]
NO_MATRICES: Mapping[int, Tensor] = {}


class Network:
    """A program, run with other matrices in the place of some rotations, or other values in the place of constants.

    Args:
        graph: rotated, with activations, caches and perhaps weights quantised; ``rotate`` says of its nodes to which
            basis each rotation belongs.
        result: the node that is wanted.
        inputs: the values of placeholders that are the same in every run.
        recompute: compute values again for the gradient, but for those that pass from one piece to the next.
    """

    def __init__(self, graph: fx.Graph, result: fx.Node, inputs: Mapping[fx.Node, Any], recompute: bool) -> None:
        self._result, self._inputs, self._recompute = result, dict(inputs), recompute
        self._constants = Constants(graph)
        needed = self._needed()
        nodes = [n for n in graph.nodes if n in needed and n not in self._constants and n.op != "placeholder"]
        self._segments = segments(nodes, self._sources, [result]) if recompute else [nodes]
        self._passed = self._read_later()

    def __call__(
        self, varying: Mapping[fx.Node, Any], matrices: Mapping[int, Tensor] = NO_MATRICES, quantized: bool = True
    ) -> Any:
        """Return the value of the result.

        Args:
            varying: values of the other placeholders, and of constants that are to have others than their own.
            matrices: of bases, by number, [order, order] each; all other rotations stay as they are.
            quantized: round what the graph rounds; else compute what the float model does.
        """
        given: Values = {**self._inputs, **varying}
        values: Values = {}
        for nodes, passed in zip(self._segments, self._passed, strict=True):
            run = partial(self._run_segment, nodes, passed, {**given, **values}, matrices, quantized)
            again = self._recompute and torch.is_grad_enabled()
            values = checkpoint(run, use_reentrant=False, preserve_rng_state=False) if again else run()
        return values[self._result]

    def quantizes(self) -> bool:
        """Whether anything that the result depends on is rounded."""
        return any(node.target is quarot.dequantize.default for node in self._needed())

    def _needed(self) -> dict[fx.Node, None]:
        found: dict[fx.Node, None] = {}
        pending = [self._result]
        while pending:
            node = pending.pop()
            if node not in found:
                found[node] = None
                pending += self._sources(node)
        return found

    def _run_segment(
        self,
        nodes: Sequence[fx.Node],
        passed: set[fx.Node],
        before: Values,
        matrices: Mapping[int, Tensor],
        quantized: bool,
    ) -> Values:
        values = dict(before)
        for node in nodes:
            self._compute(node, values, matrices, quantized)
        return {node: value for node, value in values.items() if node in passed}

    def _read_later(self) -> list[set[fx.Node]]:
        """Return, for every piece, the nodes that are read after it; constants are computed wherever they are read."""
        found: list[set[fx.Node]] = []
        read = {self._result}
        for nodes in reversed(self._segments):
            found.append(set(read))
            read.update(source for node in nodes for source in self._sources(node) if source not in self._constants)
        return found[::-1]

    def _sources(self, node: fx.Node) -> Iterable[fx.Node]:
        """Return what a node's value is computed from here."""
        if (rounded := _rounded(node)) is not None:
            return [rounded]
        return node.all_input_nodes

    def _compute(self, node: fx.Node, values: Values, matrices: Mapping[int, Tensor], quantized: bool) -> None:
        """Compute a node and the constants that it reads, in place."""
        pending = [node]
        while pending:
            one = pending[-1]
            missing = [s for s in self._sources(one) if s not in values and s in self._constants]
            if missing:
                pending += missing
                continue
            pending.pop()
            if one not in values:
                values[one] = self._run(one, values, matrices, quantized)

    def _run(self, node: fx.Node, values: Values, matrices: Mapping[int, Tensor], quantized: bool) -> Any:
        if node.op == "get_attr":
            return stored_tensor(node).detach()
        if (rounded := _rounded(node)) is not None:
            return _requantized(node, values[rounded]) if quantized else values[rounded]
        args, kwargs = cast(tuple[Any, Any], fx.map_arg((node.args, node.kwargs), values.__getitem__))
        if node.meta.get(BASIS) in matrices:
            x, rotation, dim, inner, inverse = args
            return Rotation.parse(rotation).apply(x, dim, inner, inverse, matrix=matrices[node.meta[BASIS]])
        declaration = declaration_of(node.target)  # its reference has a gradient, the registered op has none
        function: Any = node.target if declaration is None else declaration.reference
        if function is SDPA and args[0].is_cuda and is_fast():
            return attend_in_bfloat16(args, kwargs)
        return function(*args, **kwargs)


def attend_in_bfloat16(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return ``scaled_dot_product_attention`` of float32, from products of bfloat16, which GPUs have far faster kernels
    for: there are none for TF32.
    """
    half = tree_map_only(Tensor, lambda one: one.bfloat16() if one.dtype == torch.float32 else one, (args, kwargs))
    return cast(Tensor, SDPA(*half[0], **half[1])).to(args[0].dtype)


def _rounded(node: fx.Node) -> fx.Node | None:
    """Return what is rounded where a node's value is made of codes, and ``None`` if it is not."""
    if node.target is not quarot.dequantize.default:
        return None
    if (activation := quantized_activation(node)) is not None:
        return activation.source
    weight = quantization_of(node)
    return None if weight is None else weight.args[0]


def _requantized(node: fx.Node, x: Tensor) -> Tensor:
    """Return what was rounded, rounded, with a gradient."""
    if (activation := quantized_activation(node)) is not None:
        return quantize_straight_through(x, activation.scheme)
    quantization = quantization_of(node)
    assert quantization is not None, "what is dequantised was quantised"
    _, *scheme, _ = quantization.args
    codes, scale, zero = quarot.quantize_weight(x.detach(), *scheme, "nearest")
    return pass_through(x, quarot.dequantize(codes, scale, zero if len(zero) else None, x.dtype))
