"""Which layers get how many bits, so that all weights keep within a budget and the predictions change least.

Layers that share an input get the same bits: kernels multiply it by all their weights at once. Changes of the
predictions are measured for one such group at a time, rounded to nearest, and taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import networkx as nx
from torch import Tensor, fx

from quarot_fx.calibration.knapsack import choose
from quarot_fx.calibration.programs import Programs
from quarot_fx.calibration.report import BitsChoice, ChosenBits
from quarot_fx.calibration.sensitivity import Sensitivity
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig, check_bits
from quarot_fx.errors import BitsBudgetError, OptionError
from quarot_fx.float64 import evaluate
from quarot_fx.linear_like import LinearLike, linear_likes
from quarot_fx.ops.pack import packed_size
from quarot_fx.passes.quantize_weights import QuantizeWeights
from quarot_fx.passes.quantized import quantization_of
from quarot_fx.program import Program
from quarot_fx.progress import track
from quarot_fx.store import expression

TOKENS = 8192  # that changes of the predictions are measured on, and no less than one sequence

Once = Callable[[str, Callable[[], Any]], Any]
"""Of a question and a function that answers it: the answer, perhaps as it was found before."""


@dataclass(frozen=True)
class Budget:
    """How many bits there are.

    Attributes:
        bits: on average for a weight of a quantised linear layer, with its share of scales and zero points.
        choices: widths that a layer can get.

    Raises:
        OptionError: a value is out of range.
    """

    bits: float
    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not 0 < self.bits < float("inf"):
            raise OptionError(name="bits_budget", value=self.bits, reason="must be a positive number of bits a weight")
        for bits in self.choices:
            check_bits("bits_choices", bits)
            if bits == UNQUANTIZED_BITS:
                raise OptionError(name="bits_choices", value=bits, reason="must be 2 to 8")
        if not self.choices:
            raise OptionError(name="bits_choices", value=self.choices, reason="must name a width at least")


@dataclass(frozen=True)
class _Unit:
    """Layers that get the same bits.

    Attributes:
        parameters: names of their weights in the user's model.
        layers: at each of the widths there are to choose from, with weights as codes.
    """

    parameters: tuple[str, ...]
    layers: Mapping[int, Sequence[LinearLike]]

    def size(self, bits: int) -> tuple[int, int]:
        """Return the bytes of codes, scales and zero points, and the number of weights."""
        quantizations = [quantization_of(linear.weight) for linear in self.layers[bits]]
        distinct = {expression(node).key: node for node in quantizations if node is not None}
        sizes = [_size(node) for node in distinct.values()]
        return sum(one for one, _ in sizes), sum(weights for _, weights in sizes)

    def weights(self, bits: int) -> dict[str, Tensor]:
        """Return the weights rounded to nearest, by the names of the layers' nodes."""
        return {linear.node.name: evaluate(linear.weight) for linear in self.layers[bits]}


def choose_bits(
    programs: Programs, tokens: Tensor, config: QuarotConfig, budget: Budget, offload: bool, once: Once
) -> tuple[ChosenBits, ...]:
    """Return the widths with the least sum of divergences of all that keep within a budget.

    Args:
        programs: the model.
        tokens: [n, length], of which as many sequences are used as have about ``TOKENS`` tokens.
        config: whose overrides may give bits to some layers, which they keep.
        budget: of bits.
        offload: keep values on the CPU while they wait.
        once: answers how much each group of layers changes the predictions.

    Raises:
        BitsBudgetError: the budget is too small, or no layer is quantised.
    """
    units = _units(programs.rotated, config, budget.choices)
    sizes = [{bits: unit.size(bits) for bits in unit.layers} for unit in units]
    count = sum(weights for of_unit in sizes for _, weights in list(of_unit.values())[:1])
    _check_feasible(budget, sum(min(size for size, _ in of_unit.values()) for of_unit in sizes), count)
    sequences = tokens[: max(1, TOKENS // tokens.shape[1])]
    sensitivity = Sensitivity(programs, sequences, config, offload)

    def divergences(unit: _Unit) -> list[float]:
        return [sensitivity.divergence(unit.weights(bits)) for bits in unit.layers]

    choices = []
    for unit, of_unit in zip(track(units, "sensitivity"), sizes, strict=True):
        measured = once(f"divergences of {', '.join(unit.parameters)}", partial(divergences, unit))
        found = zip(unit.layers, measured, of_unit.values(), strict=True)
        choices.append([BitsChoice(bits, divergence, size) for bits, divergence, (size, _) in found])
    costs = [[one.bytes for one in of_unit] for of_unit in choices]
    losses = [[one.divergence for one in of_unit] for of_unit in choices]
    best = choose(costs, losses, int(budget.bits * count / 8))
    assert best is not None, "the budget was found to be feasible"
    return tuple(
        ChosenBits(unit.parameters, of_unit[number].bits, next(iter(size.values()))[1], tuple(of_unit))
        for unit, of_unit, size, number in zip(units, choices, sizes, best, strict=True)
    )


def chosen_overrides(config: QuarotConfig, chosen: Sequence[ChosenBits]) -> dict[str, dict[str, int]]:
    """Return overrides by parameter, of those whose bits the config's own overrides do not say."""
    free = ((parameter, one.bits) for one in chosen for parameter in one.parameters if _is_free(config, parameter))
    return {parameter: {"w_bits": bits} for parameter, bits in free}


def _units(rotated: Program, config: QuarotConfig, widths: Sequence[int]) -> list[_Unit]:
    """Return groups of quantised layers, in the order in which the model computes their inputs."""
    of_width: dict[int, dict[str, LinearLike]] = {}
    for bits in sorted(set(widths)):
        program = QuantizeWeights(_to_nearest(config, bits))(rotated)
        quantized = (linear for linear in linear_likes(program.graph) if quantization_of(linear.weight) is not None)
        of_width[bits] = {linear.node.name: linear for linear in quantized}
    linears = next(iter(of_width.values()))
    given = {name: None if _is_free(config, one.parameter) else _bits(one) for name, one in linears.items()}
    inputs = {name: ("input", linear.x, given[name]) for name, linear in linears.items()}
    units = []
    for members in nx.connected_components(nx.Graph((inputs[name], one.parameter) for name, one in linears.items())):
        names = [name for name in linears if inputs[name] in members]
        parameters = tuple(dict.fromkeys(linears[name].parameter for name in names))
        own = given[names[0]]
        choices = of_width if own is None else {own: linears}
        layers = {bits: [of_this[name] for name in names] for bits, of_this in choices.items()}
        units.append(_Unit(parameters, layers))
    return sorted(units, key=lambda unit: min(linear.x for linear in next(iter(unit.layers.values()))))


def _to_nearest(config: QuarotConfig, bits: int) -> QuarotConfig:
    """Return the config for a width, with weights rounded without calibration."""

    def uncalibrated(options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in options.items()
            if name != "w_rounding" and (name, value) != ("w_clip", "output")
        }

    overrides = {pattern: uncalibrated(dict(changes)) for pattern, changes in tuple(config.overrides)}
    clip = "search" if config.w_clip == "output" else config.w_clip
    return replace(config, w_bits=bits, w_rounding="nearest", w_clip=clip, overrides=overrides)


def _bits(linear: LinearLike) -> int:
    quantization = quantization_of(linear.weight)
    assert quantization is not None
    return int(quantization.args[1])


def _is_free(config: QuarotConfig, parameter: str) -> bool:
    """Whether no override gives a parameter its bits."""
    return "w_bits" not in config.own_options(parameter)


def _size(quantization: fx.Node) -> tuple[int, int]:
    """Return the bytes that a weight takes as codes, scales and zero points, and its elements."""
    codes, scale, zero = quantization.meta["val"]
    bits, size = quantization.args[1], codes.shape[-1]
    rows = codes.numel() // size
    return rows * packed_size(size, bits) + scale.nbytes + zero.nbytes, codes.numel()  # type: ignore[arg-type]


def _check_feasible(budget: Budget, least: int, count: int) -> None:
    if not count:
        reason, remedy = (
            "no linear layer is quantised under these options",
            "See quarot_fx.explain(model, inputs, ...).",
        )
        raise BitsBudgetError(budget=budget.bits, reason=reason, remedy=remedy)
    if least > int(budget.bits * count / 8):
        smallest = 8 * least / count
        reason = (
            f"with its scales a weight takes {smallest:.4f} bits on average if all layers have {min(budget.choices)}"
        )
        remedy = "Ask for more, give smaller bits_choices, or larger groups."
        raise BitsBudgetError(budget=budget.bits, reason=reason, remedy=remedy)
