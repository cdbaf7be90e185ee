"""Settings by name: ``float``, ``rotated``, ``W4A8KV4``, ``KV4``, ``W4A4KV4 without rotation``, ``W4A4KV4-gptq``,
``W4A4KV4-learned-gptq-tuned``.

Options of one setting stand behind it in braces: ``W4A4KV4-gptq{w_group=64 act_order=True bits_budget=4.5}``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Protocol

import typer

from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.errors import OptionError, UnknownOptionError
from quarot_fx.learning.options import LearningOptions, TuningOptions

DEFAULT_SETTINGS = (
    "float",
    "rotated",
    "W8A8KV8",
    "W6A6KV6",
    "KV4",
    "W4A4KV4",
    "W4A4KV4 without rotation",
)
_PATTERN = re.compile(
    r"((?:[WAKV]+\d+)+)(?:(?P<unrotated>-norot| without rotation)|(?P<learned>-learned| with learned rotations))?"
    r"(?P<gptq>-gptq| with gptq)?(?P<tuned>-tuned| with tuned scales)?(?:\{(?P<options>[^{}]*)\})?",
    re.IGNORECASE,
)

OptionAssignments = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="A field of QuarotConfig: kv_group=32."),
]


@dataclass(frozen=True)
class Setting:
    """A named way to run a model.

    Attributes:
        name: as the user wrote it.
        options: of ``torch.compile(model, backend="quarot")``; ``None`` runs the model as it is.
        gptq: options of GPTQ, by which weights are rounded then; ``None`` rounds them to nearest.
        learning: options of learning rotations; ``None`` leaves them random.
        tuning: options of tuning the scales of weights; ``None`` leaves them as rounding found them.
        budget: ``bits_budget`` and ``bits_choices`` of :func:`quarot_fx.calibrate`, if given.
    """

    name: str
    options: Mapping[str, Any] | None
    gptq: Mapping[str, Any] | None = None
    learning: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_calibration(self) -> bool:
        """Whether something has to be found on a text first."""
        if self.options is None:
            return False
        found = self.learning is not None or self.tuning is not None or bool(self.budget)
        return found or QuarotConfig.from_options(self.options).needs_calibration


def split_settings(text: str) -> list[str]:
    """Split names of settings at commas, but not at those in braces."""
    return re.split(r",(?![^{}]*\})", text)


def parse_setting(text: str, options: Mapping[str, Any] | None = None) -> Setting:
    """Read a setting: letters and their bits, 16 for letters not named, perhaps ``-norot`` or ``-learned``, ``-gptq``
    and ``-tuned``, and options. Those of tuning begin with ``tuning.``, as in ``{tuning.steps=300}``.

    Args:
        text: such as ``W4A8KV4``, ``KV4``, ``W4A4KV4-norot``, ``W4A4KV4-learned-gptq``, ``W4-tuned``, ``rotated`` (all
            16) or ``float``.
        options: of the backend, for every setting but ``float``; those in braces overrule them.

    Raises:
        UnknownOptionError: the text is no setting, or an option in braces is none; the nearest one is suggested.
        OptionError: a number of bits, or the value of an option, is out of range.
    """
    name = text.strip()
    if name == "float":
        return Setting(name, None)
    match = _PATTERN.fullmatch("WAKV16" if name == "rotated" else name)
    if match is None:
        raise UnknownOptionError("setting", name, DEFAULT_SETTINGS)
    bits = dict.fromkeys(("w_bits", "a_bits", "k_bits", "v_bits"), UNQUANTIZED_BITS)
    for tensors, width in re.findall(r"(\D+)(\d+)", match[1]):
        bits |= {f"{tensor.lower()}_bits": int(width) for tensor in tensors}
    own = parse_assignments((match["options"] or "").split())
    budget = {option: own.pop(option) for option in BUDGET if option in own}
    if "bits_choices" in budget and "bits_budget" not in budget:
        raise OptionError(name="bits_choices", value=budget["bits_choices"], reason="goes with a bits_budget")
    of_gptq = {option: own.pop(option) for option in list(own) if match["gptq"] and option in _GPTQ_OPTIONS}
    of_learning = {option: own.pop(option) for option in list(own) if match["learned"] and option in _LEARNING_OPTIONS}
    about_tuning = [option for option in own if match["tuned"] and option.startswith(TUNING)]
    of_tuning = {option.removeprefix(TUNING): own.pop(option) for option in about_tuning}
    rotation = {"rotation": "none"} if match["unrotated"] else {}
    rounding = {"w_rounding": "gptq"} if match["gptq"] else {}
    setting = Setting(
        name,
        {**bits, **rotation, **rounding, **(options or {}), **own},
        of_gptq if match["gptq"] else None,
        of_learning if match["learned"] else None,
        of_tuning if match["tuned"] else None,
        budget,
    )
    QuarotConfig.from_options(setting.options)
    GPTQOptions.from_options(setting.gptq)
    LearningOptions.from_options(setting.learning)
    TuningOptions.from_options(setting.tuning)
    return setting


BUDGET = ("bits_budget", "bits_choices")
TUNING = "tuning."
_GPTQ_OPTIONS = {field.name for field in fields(GPTQOptions)}
_LEARNING_OPTIONS = {field.name for field in fields(LearningOptions)} - {"seed"}  # which is the backend's


class Options(Protocol):
    """A dataclass of options."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Any:
        """Build it from a mapping, or raise an error that names what is wrong."""


def parse_options(assignments: Iterable[str] | None, of: type[Options] = QuarotConfig) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts as options of the backend, or of another part.

    Args:
        assignments: as typer gives them; ``None`` are none.
        of: the dataclass whose fields the names are.

    Raises:
        OptionError: a text has no ``=``, or a value is out of range.
        UnknownOptionError: a name is not a field; the nearest one is suggested.
    """
    options = parse_assignments(assignments or ())
    of.from_options(options)
    return options


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts; a value is a Python literal, or else a string.

    Raises:
        OptionError: a text has no ``=``.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise OptionError(name=assignment, value="", reason="write it as NAME=VALUE")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values
