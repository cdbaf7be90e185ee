"""Files of settings, such as those of an ablation: a list in JSON or TOML, one entry for each line of the table."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quarot_fx.cli.settings import Setting, parse_setting
from quarot_fx.errors import NotFoundError, OptionError, UnknownOptionError

KEYS = ("name", "setting", "options")
FORMAT = (
    'write a list "settings" of names, or of tables with a "setting" and perhaps "options" and a "name": '
    '[[settings]] setting = "W4A4KV4", options = {a_group = 64}, in TOML'
)


def read_settings(path: Path, options: Mapping[str, Any]) -> list[Setting]:
    """Read settings from a ``.json`` or ``.toml`` file.

    An entry is the name of a setting, or a table: its ``setting``, ``options`` besides, and the ``name`` by which
    tables show it.

    Args:
        path: the file.
        options: added to every setting but ``float``; those of an entry overrule them.

    Raises:
        NotFoundError: there is no such file.
        OptionError: it cannot be read, an entry is none, or two have one name.
        UnknownOptionError: an entry names a setting, a key or an option that does not exist.
    """
    settings = [_setting(path, entry, options) for entry in _entries(path)]
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise _error(path, f"two settings are called {name!r}: give each a name of its own")
    return settings


def _entries(path: Path) -> list[Any]:
    if not path.is_file():
        raise NotFoundError(kind="file", name=str(path), remedy="Give a .json or .toml file of settings.")
    text = path.read_text(encoding="utf-8")
    try:
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # of which both kinds of syntax errors are
        raise _error(path, f"cannot be read: {error}") from error
    entries = content.get("settings") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise _error(path, FORMAT)
    return entries


def _setting(path: Path, entry: Any, options: Mapping[str, Any]) -> Setting:
    if isinstance(entry, str):
        return parse_setting(entry, options)
    if not isinstance(entry, dict) or not isinstance(entry.get("setting"), str):
        raise _error(path, FORMAT)
    for key in entry:
        if key not in KEYS:
            raise UnknownOptionError("key of a setting", key, KEYS)
    own = entry.get("options", {})
    if not isinstance(own, dict):
        raise _error(path, FORMAT)
    setting = parse_setting(entry["setting"], {**options, **own})
    if own and setting.options is None:
        raise _error(path, f"{setting.name!r} is the model as it is, which has no options")
    name = entry.get("name") or ", ".join([setting.name, *(f"{option}={value}" for option, value in own.items())])
    return replace(setting, name=str(name))


def _error(path: Path, reason: str) -> OptionError:
    return OptionError(name="settings-file", value=str(path), reason=reason)
