"""The options of learning rotations, and those of tuning scales, as a frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quarot_fx.errors import OptionError
from quarot_fx.option_checks import check_choice, check_flag, check_integer, from_mapping

LOSSES = ("cross-entropy", "divergence")
WEIGHTS = ("float", "nearest")


@dataclass(frozen=True)
class LearningOptions:
    """How rotations are learned.

    Attributes:
        steps: of the optimiser.
        batch: sequences in a step.
        length: tokens of a sequence: longer ones are cut into several; ``None`` takes them as they are. Attention, and
            so a step, costs less for more and shorter ones.
        rate: the angle, in radians, that each axis is turned by in the first steps; it falls to 0 along a cosine.
        loss: ``"cross-entropy"``, of the next token, as SpinQuant has it; or ``"divergence"``, that of Kullback and
            Leibler of the predictions from the float model's.
        weights: that the model is run with meanwhile: ``"float"``, as is best for weights that GPTQ rounds afterwards
            (as SpinQuant found), or ``"nearest"``, rounded to nearest in every step.
        heads: also learn the rotations of values, one a layer. A cache that holds values as codes holds them rotated by
            a Hadamard, so that a model that runs with one is learned with ``heads=False``.
        seed: of the order of sequences. Where learning starts is decided by the ``seed`` of the backend's options.
        recompute: compute most values again for the gradient, a piece of the graph at a time, instead of keeping them:
            far less memory, for a third more time.

    Raises:
        OptionError: a value is out of range.
        UnknownOptionError: a choice that there is not.
    """

    steps: int = 100
    batch: int = 4
    length: int | None = None
    rate: float = 0.1
    loss: str = "cross-entropy"
    weights: str = "float"
    heads: bool = True
    seed: int = 0
    recompute: bool = True

    def __post_init__(self) -> None:
        _check_counts(self, steps=1, batch=1, length=2, seed=0)
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise OptionError(name="rate", value=self.rate, reason="must be an angle in (0, 1] radians")
        for name in ("heads", "recompute"):
            check_flag(name, getattr(self, name))
        for name, known in (("loss", LOSSES), ("weights", WEIGHTS)):
            check_choice(name, getattr(self, name), known)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> LearningOptions:
        """Build options from a mapping.

        Raises:
            UnknownOptionError: a name is not an option; the nearest one is suggested.
        """
        return from_mapping(cls, "option of learning", options)


@dataclass(frozen=True)
class TuningOptions:
    """How scales of weights are tuned.

    Attributes:
        steps: of the optimiser, Adam.
        batch: sequences in a step.
        length: tokens of a sequence: longer ones are cut into several; ``None`` takes them as they are.
        rate: the fraction that each scale changes by in the first steps, about; it falls to 0 along a cosine.
        held_out: fraction of the sequences that nothing is tuned on, and that decide which scales are kept: the last
            ones, at least a batch.
        interval: steps between two looks at these.
        seed: of the order of sequences.
        recompute: compute most values again for the gradient, a piece of the graph at a time, instead of keeping them.

    Raises:
        OptionError: a value is out of range.
    """

    steps: int = 100
    batch: int = 4
    length: int | None = None
    rate: float = 0.002
    held_out: float = 0.125
    interval: int = 20
    seed: int = 0
    recompute: bool = True

    def __post_init__(self) -> None:
        _check_counts(self, steps=1, batch=1, length=2, interval=1, seed=0)
        for name in ("rate", "held_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise OptionError(name=name, value=value, reason="must be a fraction in (0, 1)")
        check_flag("recompute", self.recompute)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> TuningOptions:
        """Build options from a mapping.

        Raises:
            UnknownOptionError: a name is not an option; the nearest one is suggested.
        """
        return from_mapping(cls, "option of tuning", options)


def _check_counts(options: Any, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(options, name)
        if name != "length" or value is not None:
            check_integer(name, value, smallest)
