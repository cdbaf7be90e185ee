"""What quantisation does to each layer: the ratio of signal to noise of its weight, of what enters it, of its output.

Read off the captured program itself, with the model's own data: no module is hooked, and whatever is a linear layer to
the compiler is one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from quarot_fx.attention import Read, before_repetition, reads_of_keys_and_values
from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.float64 import evaluate
from quarot_fx.graph import argument_nodes
from quarot_fx.inspection import Inputs, Model, bound_program
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.observation import Observer, observe
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline, split_at_quantization
from quarot_fx.passes.quantized import requantized
from quarot_fx.printed import Printed
from quarot_fx.program import Program
from quarot_fx.report import CacheRecord, LinearRecord, without_index

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

COLUMNS = ("weight", "activation", "output")


@dataclass(frozen=True)
class LayerSQNR:
    """What quantisation does to one linear layer. Ratios are in dB, ``10 log10(|x|^2 / |x - x'|^2)`` over the whole
    tensor; ``None`` where nothing is rounded.

    Attributes:
        linear: the layer, its bits and how it is rotated.
        weight: ratio of the weight, in the basis that it is quantised in.
        activation: ratio of what enters the layer.
        output: ratio of what the layer computes when both are quantised.
        ranges: largest magnitude of each channel of what enters the layer: float64 [in], on the model's device.
    """

    linear: LinearRecord
    weight: float | None
    activation: float | None
    output: float | None
    ranges: Tensor = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return all but the ranges as JSON-able data."""
        return {**asdict(self.linear), **{column: getattr(self, column) for column in COLUMNS}}


@dataclass(frozen=True)
class CacheSQNR:
    """What quantisation does to the keys or values of one attention.

    Attributes:
        cache: which, its bits and how it is rotated.
        sqnr: in dB; ``None`` if it is not quantised.
    """

    cache: CacheRecord
    sqnr: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {**asdict(self.cache), "sqnr": self.sqnr}


@dataclass(frozen=True)
class SQNRReport(Printed):
    """Signal to quantisation noise of every linear layer and every cache, in the order in which they are computed.

    Attributes:
        layers: the linear layers.
        caches: keys and values.
    """

    layers: tuple[LayerSQNR, ...]
    caches: tuple[CacheSQNR, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return {
            "layers": [layer.as_dict() for layer in self.layers],
            "caches": [cache.as_dict() for cache in self.caches],
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(self._table(), self._summary())

    def _table(self) -> Table:
        table = _table("signal to quantisation noise, dB", *COLUMNS)
        for layer in self.layers:
            linear = layer.linear
            bits = f"W{linear.w_bits}A{linear.a_bits}"
            table.add_row(linear.parameter, bits, linear.rotated, *map(_decibels, _ratios(layer)))
        for one in self.caches:
            table.add_row(
                f"{one.cache.where} {one.cache.kind}s",
                f"KV{one.cache.bits}",
                one.cache.rotated,
                "",
                _decibels(one.sqnr),
            )
        return table

    def _summary(self) -> Table:
        """Return the median and the least of layers that differ by a number in their names only."""
        table = _table("median (least) of all layers, dB", *COLUMNS)
        kinds: dict[tuple[str, str, str], list[tuple[float | None, ...]]] = {}
        for layer in self.layers:
            linear = layer.linear
            key = (without_index(linear.parameter), f"W{linear.w_bits}A{linear.a_bits}", linear.rotated)
            kinds.setdefault(key, []).append(_ratios(layer))
        for one in self.caches:
            key = (f"{one.cache.kind}s", f"KV{one.cache.bits}", one.cache.rotated)
            kinds.setdefault(key, []).append((None, one.sqnr, None))
        for key, rows in kinds.items():
            table.add_row(*key, *(_median_and_least(column) for column in zip(*rows, strict=True)))
        return table


def sqnr(model: Model, inputs: Inputs = (), **options: Any) -> SQNRReport:
    """Return what quantisation does to each linear layer and each cache of a model, on inputs of its own.

    The model is captured and rotated as the backend does it, and run in float64. Each layer is quantised on its own:
    all others compute exactly, so that errors do not add up, and settings can be compared layer by layer.

    Args:
        model: an ``nn.Module`` in eval mode, a function of one, an exported program or a graph, as
            :func:`quarot_fx.rewrite` takes it. It stays as it is.
        inputs: of one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Where token ids
            [batch, length] are wanted, a few hundred tokens of real text are enough.
        options: fields of :class:`~quarot_fx.config.QuarotConfig`; with ``rotation="none"`` for comparison.

    Returns:
        a report: ``print`` shows it, ``layers`` and ``caches`` are the numbers.

    Raises:
        NotOneGraphError: the model has graph breaks, or no parameters.
        UnboundParameterError: a parameter is on the meta device.
        GraphInputError: a graph does not fit its inputs, or stores no weights.
    """
    program, arguments = bound_program(model, inputs, needs_data=True)
    return measure_sqnr(program, arguments, QuarotConfig.from_options(options))


def measure_sqnr(program: Program, arguments: list[Any], config: QuarotConfig) -> SQNRReport:
    """Return the report of a captured program, which stays as it is, for arguments of all its placeholders."""
    before, quantizing = split_at_quantization(build_pipeline(config))
    exact = run_pipeline(program, before)
    quantized = run_pipeline(exact, quantizing)
    covered = cover(quantized)
    layers = [*_layer_observers(exact.graph, quantized.graph, covered.linears)]
    caches = [*_cache_observers(exact.graph, quantized.graph, covered.caches)]
    answers = observe(exact, [*layers, *caches], arguments)
    return SQNRReport(tuple(answers[: len(layers)]), tuple(answers[len(layers) :]))


def _layer_observers(exact: fx.Graph, quantized: fx.Graph, records: list[LinearRecord]) -> Iterator[Observer]:
    """Yield what compares each linear layer of an exact graph with the one of the same name that is quantised."""
    linears = {linear.node.name: linear for linear in linear_likes(exact)}
    for rounded, record in zip(linear_likes(quantized), records, strict=True):
        linear = linears[rounded.node.name]
        yield Observer(_compare_layer(linear, rounded, record), (linear.node, *argument_nodes(linear.node)))


def _compare_layer(linear: LinearLike, rounded: LinearLike, record: LinearRecord) -> Callable[..., LayerSQNR]:
    def compare(output: Tensor, *operands: Tensor) -> LayerSQNR:
        x, weight = operands[linear.spelling.x], operands[linear.spelling.weight]
        rounded_x, rounded_weight = requantized(x, rounded.x), evaluate(rounded.weight)
        replaced = {linear.spelling.x: rounded_x, linear.spelling.weight: rounded_weight}
        rounded_output = _called(linear.node, [replaced.get(place, value) for place, value in enumerate(operands)])
        return LayerSQNR(
            record,
            weight=_ratio(weight, rounded_weight),
            activation=_ratio(x, rounded_x),
            output=_ratio(output, rounded_output),
            ranges=x.abs().flatten(0, -2).amax(0),
        )

    return compare


def _cache_observers(exact: fx.Graph, quantized: fx.Graph, records: list[CacheRecord]) -> Iterator[Observer]:
    """Yield what compares the keys or values that each attention reads."""
    reads = zip(reads_of_keys_and_values(exact), reads_of_keys_and_values(quantized), records, strict=True)
    for before, after, record in reads:
        yield Observer(_compare_cache(_read(after), record), (_read(before),))


def _read(read: Read) -> fx.Node:
    user, place = before_repetition(read)
    return argument_nodes(user)[place]


def _compare_cache(rounded: fx.Node, record: CacheRecord) -> Callable[[Tensor], CacheSQNR]:
    def compare(x: Tensor) -> CacheSQNR:
        return CacheSQNR(record, _ratio(x, requantized(x, rounded)))

    return compare


def _called(node: fx.Node, operands: Sequence[Any]) -> Tensor:
    """Return what a node's operator makes of other values in the place of its argument nodes."""
    values = iter(operands)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(values))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _ratio(x: Tensor, rounded: Tensor) -> float | None:
    """Return a signal to noise ratio in dB; ``None`` without noise."""
    signal, noise = float(x.square().sum()), float((x - rounded).square().sum())
    return 10 * math.log10(signal / noise) if noise else None


# -- tables ----------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("bits")
    table.add_column("rotated")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _ratios(layer: LayerSQNR) -> tuple[float | None, ...]:
    return tuple(getattr(layer, column) for column in COLUMNS)


def _decibels(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}"


def _median_and_least(ratios: tuple[float | None, ...]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{median(known):.1f} ({min(known):.1f})" if known else ""
