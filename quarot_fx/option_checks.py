"""What every dataclass of options checks in the same way, and with the same words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from quarot_fx.errors import OptionError, UnknownOptionError

Options = TypeVar("Options")


def from_mapping(options_class: type[Options], kind: str, options: Mapping[str, Any] | None) -> Options:
    """Build a dataclass of options; raise an UnknownOptionError, with the nearest name, for what is not one."""
    known = {field.name for field in fields(options_class)}  # type: ignore[arg-type]
    for name in options or {}:
        if name not in known:
            raise UnknownOptionError(kind, str(name), known)
    return options_class(**(options or {}))


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise an OptionError unless an option is an integer that is not too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(name=name, value=value, reason=f"must be an integer, {least} or more")


def check_flag(name: str, flag: Any) -> None:
    """Raise an OptionError unless an option is True or False."""
    if not isinstance(flag, bool):
        raise OptionError(name=name, value=flag, reason="must be True or False")


def check_choice(name: str, choice: Any, known: Collection[str]) -> None:
    """Raise an UnknownOptionError unless an option is one of some words."""
    if choice not in known:
        raise UnknownOptionError(name, str(choice), known)
