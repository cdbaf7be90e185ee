"""Running a graph with every floating-point value and cast promoted to float64.

In float64 a rotated graph equals the original to rounding, so a difference is a mistake and not noise. Constants made
from weights are evaluated the same way, and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

from quarot_fx.calibration.calibrated import calibrated_by, calibrated_codes
from quarot_fx.checkpoint.saved import missing_value, saved_value
from quarot_fx.errors import NonFiniteWeightError, OriginalsFreedError
from quarot_fx.graph import stored_tensor, with_sources
from quarot_fx.ops.declaration import reference_of
from quarot_fx.row_blocks import computed_by_rows, has_rows, rotates_rows, row_blocks, size_of
from quarot_fx.store import check_not_freed, expression

Known = MutableMapping[fx.Node, Any]
"""Results of the nodes that are too dear to compute more than once: those that quantise weights."""

_WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}


def widen(value: Any) -> Any:
    """Return a tensor in float64 or complex128, a floating-point dtype as the wide one, anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


class Float64Interpreter(fx.Interpreter):
    """Runs a graph module, or another graph of what it stores, in float64, whatever its casts say."""

    def __init__(self, module: fx.GraphModule, known: Known | None = None, graph: fx.Graph | None = None) -> None:
        super().__init__(module, graph=graph)
        self._known = {} if known is None else known

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one operator with wide dtypes; factories that name no dtype are widened afterwards.

        Kernels take no float64, so that an op that was given to one runs as its reference.
        """
        result = super().call_function(reference_of(target), map_aggregate(args, widen), map_aggregate(kwargs, widen))
        return map_aggregate(result, widen)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a write to a stored tensor of the user's writes to nothing."""
        if n.target is torch.ops.aten.copy_.default and n.args[0].op == "get_attr":  # type: ignore[union-attr]
            return None
        return _once(n, self._known, lambda: super(Float64Interpreter, self).run_node(n))

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a stored tensor in float64."""
        tensor = super().get_attr(target, args, kwargs)
        check_not_freed(tensor, "the graph is run in float64")
        return widen(tensor)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read an input in float64, cloned so that the caller's tensors are never written to."""
        value = widen(super().placeholder(target, args, kwargs))
        return value.clone() if isinstance(value, torch.Tensor) else value


def run_in_float64(module: fx.GraphModule, *inputs: Any, known: Known | None = None) -> list[torch.Tensor]:
    """Run a graph in float64 and return its tensor outputs, flattened. The inputs are left as they are."""
    with torch.no_grad():
        result = Float64Interpreter(module, known).run(*inputs)
    outputs: list[torch.Tensor] = []
    map_aggregate(result, lambda v: outputs.append(v) if isinstance(v, torch.Tensor) else None)
    return outputs


def _once(node: fx.Node, known: Known, compute: Callable[[], Any]) -> Any:
    if node.target is not torch.ops.quarot.quantize_weight.default:
        return compute()
    if node not in known:
        saved = saved_value(node)
        if saved is None:
            saved = calibrated_codes(node) if calibrated_by(node) else compute()
        known[node] = saved
    return known[node]


def evaluate(node: fx.Node, known: Known | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the value of a constant node, computed in float64 (integers as they are) and rounded to a dtype at the
    end, if one is given.

    If a parameter that it depends on is on the meta device, so is the result, a contiguous tensor.
    """
    if any(leaf.is_meta for leaf in expression(node).leaves):
        val = node.meta["val"]
        return torch.empty(val.shape, dtype=dtype or _WIDE.get(val.dtype, val.dtype), device="meta")
    with torch.no_grad():
        try:
            value: torch.Tensor = _Evaluation(node, {} if known is None else known).result(dtype)
            return value
        except OriginalsFreedError as error:
            raise missing_value(node) or error from None


class _Evaluation:
    """Computes a constant, and keeps the value of a step for as long as another needs it."""

    def __init__(self, node: fx.Node, known: Known) -> None:
        self._node, self._known = node, known
        self._values: dict[fx.Node, Any] = {}
        self._readers = Counter(source for one in with_sources(node) for source in one.all_input_nodes)

    def result(self, dtype: torch.dtype | None) -> Any:
        """Return the value, rounded."""
        value = _once(self._node, self._known, lambda: self._computed(self._node, dtype))
        return value if dtype is None else value.to(dtype)

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = _once(node, self._known, lambda: self._computed(node))
        return self._values[node]

    def _computed(self, node: fx.Node, dtype: torch.dtype | None = None) -> Any:
        saved = saved_value(node)
        if saved is not None:
            return saved
        if node.op == "get_attr":
            return widen(_finite(node))
        if steps := computed_by_rows(node):
            return self._by_rows(steps, dtype)
        value = self._by_columns(node) if rotates_rows(node) else _call(node, self._value)
        self._let_go(node)
        return value

    def _let_go(self, node: fx.Node) -> None:
        """Drop what only a node needed that is computed now."""
        for source in node.all_input_nodes:
            self._readers[source] -= 1
            if not self._readers[source]:
                self._values.pop(source, None)

    def _whole(self, node: fx.Node) -> Any:
        """Return a value of which parts are taken: a parameter as it is, without a copy in float64."""
        return _finite(node) if node.op == "get_attr" and saved_value(node) is None else self._value(node)

    def _by_columns(self, node: fx.Node) -> torch.Tensor:
        """Rotate the rows of a matrix, a few columns at a time."""
        x, *how = node.args
        whole = self._whole(x)  # type: ignore[arg-type]
        result = torch.empty_like(whole, dtype=torch.float64, memory_format=torch.contiguous_format)
        for columns in row_blocks(whole.mT.shape):
            result[:, columns] = node.target(widen(whole[:, columns]), *how)  # type: ignore[operator]
        return result

    def _by_rows(self, steps: Sequence[fx.Node], dtype: torch.dtype | None) -> Any:
        """Compute the last of some steps a few rows at a time."""
        size = size_of(steps[-1])
        given = {node for step in steps for node in step.all_input_nodes if node not in steps}
        given |= {step for step in steps if saved_value(step) is not None}
        wholes = {node: self._whole(node) for node in given}
        result = _Stacked(size[0])
        for rows in row_blocks(size):
            values = {node: widen(whole[rows] if has_rows(node, size) else whole) for node, whole in wholes.items()}
            for step in steps:
                if step not in values:
                    values[step] = _call(step, values.__getitem__)
            block = values[steps[-1]]
            result.put(rows, tree_map(lambda part: part if dtype is None else part.to(dtype), block))
        for step in steps:
            self._let_go(step)
        return result.value


class _Stacked:
    """A tensor, or a tuple of some, filled a few rows at a time."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.value: Any = None

    def put(self, rows: slice, block: Any) -> None:
        """Fill in some rows; a result without rows, such as the zero points that there are not, is kept as it is."""
        if self.value is None:
            self.value = tree_map(
                lambda part: part.new_empty(self._rows, *part.shape[1:]) if len(part) else part, block
            )
        for whole, part in zip(tree_leaves(self.value), tree_leaves(block), strict=True):
            if len(part):
                whole[rows] = part


def _call(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = map_aggregate(fx.map_arg((node.args, node.kwargs), value), widen)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _finite(node: fx.Node) -> torch.Tensor:
    tensor = stored_tensor(node)
    check_not_freed(tensor, "another graph of the model needs it in another form")
    if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
        name = node.meta.get("parameter", node.target)
        raise NonFiniteWeightError(parameter=name, count=int((~finite).sum()))
    return tensor


def relative_difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest norm of a difference between floating-point outputs, relative to the expected norm.

    A NaN that is not expected is an infinite difference.
    """
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if e.is_floating_point() and e.numel():
            same = (a == e) | (a.isnan() & e.isnan())  # equal infinities differ by NaN
            difference = torch.where(same, 0, a - e).double().norm()
            scale = torch.where(e.isfinite(), e, 0).double().norm().clamp_min(torch.finfo(torch.float64).tiny)
            worst = max(worst, float((difference / scale).nan_to_num(nan=torch.inf)))
    return worst
