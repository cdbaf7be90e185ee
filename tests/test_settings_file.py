"""Files of settings: what they may say, and what is said of those that say something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarot_fx.cli.settings import parse_setting
from quarot_fx.cli.settings_file import read_settings
from quarot_fx.errors import NotFoundError, OptionError, UnknownOptionError

TOML = """
settings = [
    "float",
    "W4A4KV4-norot",
    {setting = "W4A4KV4", options = {a_group = 64, a_sym = false}},
    {name = "all of 8 bits", setting = "W8A8KV8"},
]
"""


def test_toml_and_json_say_the_same(tmp_path):
    toml, in_object, in_list = (tmp_path / name for name in ("a.toml", "a.json", "b.json"))
    entries = [
        "float",
        "W4A4KV4-norot",
        {"setting": "W4A4KV4", "options": {"a_group": 64, "a_sym": False}},
        {"name": "all of 8 bits", "setting": "W8A8KV8"},
    ]
    toml.write_text(TOML)
    in_object.write_text(json.dumps({"settings": entries}))
    in_list.write_text(json.dumps(entries))
    settings = read_settings(toml, {})
    assert settings == read_settings(in_object, {}) == read_settings(in_list, {})
    assert settings[0].options is None
    assert settings[1] == parse_setting("W4A4KV4-norot")
    assert settings[2].name == "W4A4KV4, a_group=64, a_sym=False"
    assert settings[2].options == {**parse_setting("W4A4KV4").options, "a_group": 64, "a_sym": False}
    assert settings[3].name == "all of 8 bits"
    assert settings[3].options == parse_setting("W8A8KV8").options


def test_options_of_an_entry_overrule_those_of_all(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('["W4", {"name": "seeded", "setting": "W4", "options": {"seed": 2}}]')
    assert [setting.options["seed"] for setting in read_settings(file, {"seed": 1})] == [1, 2]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("[", OptionError, "cannot be read"),
        ("[]", OptionError, 'write a list "settings"'),
        ("3", OptionError, 'write a list "settings"'),
        ('{"other": []}', OptionError, 'write a list "settings"'),
        ('[{"options": {}}]', OptionError, 'write a list "settings"'),
        ('[{"setting": "W4", "options": 3}]', OptionError, 'write a list "settings"'),
        ('["W4", "W4"]', OptionError, "two settings are called 'W4'"),
        ('[{"setting": "float", "options": {"seed": 1}}]', OptionError, "has no options"),
        ('[{"setting": "W4A4KV", "options": {}}]', UnknownOptionError, "Did you mean 'W4A4KV4'"),
        ('[{"setting": "W4", "option": {}}]', UnknownOptionError, "Did you mean 'options'"),
        ('[{"setting": "W4", "options": {"a_groups": 3}}]', UnknownOptionError, "Did you mean 'a_group'"),
        ('[{"setting": "W4", "options": {"a_group": 0}}]', OptionError, "a_group=0"),
    ],
)
def test_mistakes_are_typed(tmp_path, content, error, message):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(error, match=message):
        read_settings(file, {})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(NotFoundError, match="found no file"):
        read_settings(tmp_path / "none.toml", {})


def test_the_ablation_of_the_documents_is_a_file_of_settings():
    settings = read_settings(Path(__file__).parent.parent / "examples" / "ablation.toml", {})
    assert settings[0].options is None
    assert any(setting.options and setting.options.get("rotation") == "random" for setting in settings)
