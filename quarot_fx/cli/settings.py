"""Settings by name: ``float``, ``rotated``, ``W4A8KV4``, ``KV4``, ``W4A4KV4 without rotation``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.errors import OptionError, UnknownOptionError

DEFAULT_SETTINGS = (
    "float",
    "rotated",
    "W8A8KV8",
    "W6A6KV6",
    "KV4",
    "W4A4KV4",
    "W4A4KV4 without rotation",
)
_PATTERN = re.compile(r"((?:[WAKV]+\d+)+)(-norot| without rotation)?", re.IGNORECASE)

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
    """

    name: str
    options: Mapping[str, Any] | None


def parse_setting(text: str, options: Mapping[str, Any] | None = None) -> Setting:
    """Read a setting: letters and their bits, 16 for letters not named, and perhaps ``-norot``.

    Args:
        text: such as ``W4A8KV4``, ``KV4``, ``W4A4KV4-norot``, ``rotated`` (all 16) or ``float``.
        options: added to the setting's, except to those of ``float``.

    Raises:
        UnknownOptionError: the text is no setting; the nearest one is suggested.
        OptionError: a number of bits is out of range.
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
    rotation = {"rotation": "none"} if match[2] else {}
    setting = Setting(name, {**bits, **rotation, **(options or {})})
    QuarotConfig.from_options(setting.options)
    return setting


def parse_options(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts as options.

    Raises:
        OptionError: a text has no ``=``.
        UnknownOptionError: a name is not a field of :class:`QuarotConfig`.
    """
    options = parse_assignments(assignments)
    QuarotConfig.from_options(options)
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
