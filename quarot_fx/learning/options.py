"""The options of learning rotations, as one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quarot_fx.errors import OptionError, UnknownOptionError

LOSSES = ("divergence", "cross-entropy")
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
        loss: ``"divergence"``, that of Kullback and Leibler of the predictions from the float model's; or
            ``"cross-entropy"``, of the next token.
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
    rate: float = 0.03
    loss: str = "divergence"
    weights: str = "float"
    heads: bool = True
    seed: int = 0
    recompute: bool = True

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if name == "length" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(name=name, value=value, reason=f"must be an integer, {least} or more")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise OptionError(name="rate", value=self.rate, reason="must be an angle in (0, 1] radians")
        for name in ("heads", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(name=name, value=getattr(self, name), reason="must be True or False")
        for name, known in (("loss", LOSSES), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise UnknownOptionError(name, str(getattr(self, name)), known)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> LearningOptions:
        """Build options from a mapping.

        Raises:
            UnknownOptionError: a name is not an option; the nearest one is suggested.
        """
        known = {field.name for field in fields(cls)}
        for name in options or {}:
            if name not in known:
                raise UnknownOptionError("option of learning", str(name), known)
        return cls(**(options or {}))
