"""Texts by name: what is asked of the ``datasets`` library, and how rows become the text that GPTQ and QuaRot read."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from quarot_fx.errors import MissingExtraError, NotFoundError
from quarot_fx.text import DATASETS, most_windows, read_text


class Rows(dict):
    """A table as ``datasets`` has it, as far as it is read."""

    @property
    def column_names(self):
        return list(self)

    def __len__(self):
        return len(next(iter(self.values())))

    def select(self, places):
        return Rows({name: [column[place] for place in places] for name, column in self.items()})


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``datasets``: ``answer`` is what ``load_dataset`` gives or raises, ``asked`` its arguments."""
    module = ModuleType("datasets")
    module.asked = []

    def load_dataset(**arguments):
        module.asked.append(arguments)
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_wikitext2_is_its_raw_test_split_with_blank_lines_between_rows(hub):
    hub.answer = Rows(text=["", " = Title = \n", " words \n"])
    assert read_text("wikitext2") == "\n\n = Title = \n\n\n words \n"
    assert hub.asked == [{"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}]


def test_c4_is_the_first_rows_of_one_validation_file_with_spaces_between(hub):
    hub.answer = Rows(text=[f"row{row}" for row in range(1200)], url=["u"] * 1200)
    assert read_text("c4").split(" ") == [f"row{row}" for row in range(1100)]
    assert hub.asked[0]["data_files"] == {"test": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub.asked[0]["split"] == "test"
    assert most_windows("c4") == 256


def test_other_splits_have_all_rows(hub):
    hub.answer = Rows(text=["a"] * 1200)
    assert len(read_text("c4", split="train").split(" ")) == 1200
    assert hub.asked[0]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


def test_ptb_has_its_text_in_another_column_with_spaces_between(hub):
    hub.answer = Rows(sentence=["no it was", "n't black monday"])
    assert read_text("ptb") == "no it was n't black monday"
    assert hub.asked[0]["split"] == "test"
    assert most_windows("ptb") is None


def test_any_dataset_on_the_hub_by_its_name_and_config(hub):
    hub.answer = Rows(text=["one", "two"])
    assert read_text("someone/something:small", split="train") == "one\n\ntwo"
    assert hub.asked == [{"path": "someone/something", "name": "small", "split": "train"}]


def test_a_dataset_without_that_column_says_what_it_has(hub):
    hub.answer = Rows(content=["one"])
    with pytest.raises(NotFoundError, match=r"found no column 'text' in 'someone/something'\. It has content"):
        read_text("someone/something")


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_cannot_be_reached_is_a_typed_error(hub, name):
    hub.answer = ConnectionError("the hub is out of reach")
    with pytest.raises(NotFoundError, match=rf"found no text '{name}'\. Give a text file.*the hub is out of reach"):
        read_text(name)


@pytest.mark.parametrize("name", DATASETS)
def test_without_the_library_the_error_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quarot-fx\[eval\]'"):
        read_text(name)
