"""Texts by name, and the windows of tokens that perplexity is measured and weights are calibrated on."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from quarot_fx.errors import NotFoundError, OptionError
from quarot_fx.extras import import_extra

MAX_CHARACTERS = 2**25  # of a dataset: WikiText-2 thrice, some 7 million tokens


@dataclass(frozen=True)
class Dataset:
    """A dataset, and how GPTQ and QuaRot make one text of it.

    Attributes:
        arguments: of ``datasets.load_dataset``.
        files: which of many files is taken for a split.
        column: that holds the text of a row.
        separator: between rows.
        test_rows: of the test split, only so many.
        test_windows: only so many windows of tokens are measured.
    """

    arguments: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    column: str = "text"
    separator: str = "\n\n"
    test_rows: int | None = None
    test_windows: int | None = None


DATASETS = {
    "wikitext2": Dataset({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}),
    "c4": Dataset(
        {"path": "allenai/c4"},
        files={"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
        separator=" ",
        test_rows=1100,
        test_windows=256,
    ),
    # The dataset is a script, which the library no longer runs; the hub keeps what it made.
    "ptb": Dataset(
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        column="sentence",
        separator=" ",
    ),
}


def read_text(name: str, split: str = "test") -> str:
    """Return a file's text, ``"pydoc"`` (English that every Python has), or a split of a dataset.

    Args:
        name: a path, ``"pydoc"``, a name in ``DATASETS``, or ``"OWNER/NAME"`` or ``"OWNER/NAME:CONFIG"`` of a dataset
            on the hub that has a column ``text``, whose rows blank lines separate.
        split: of a dataset, whose first rows are taken, ``MAX_CHARACTERS`` of them.

    Raises:
        NotFoundError: it is neither, or cannot be reached.
        MissingExtraError: a dataset was asked for and ``datasets`` is not installed.
    """
    if name == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[topic] for topic in sorted(topics))
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if name not in DATASETS and (path.suffix or path.is_absolute() or name.startswith(".") or "/" not in name):
        raise NotFoundError(kind="text", name=name, remedy=_REMEDY)
    datasets = import_extra("datasets", extra="eval")
    repository, _, config = name.partition(":")
    dataset = DATASETS.get(name) or Dataset({"path": repository, "name": config or None})
    files = {"data_files": {split: dataset.files[split]}} if split in dataset.files else {}
    try:
        rows = datasets.load_dataset(**dataset.arguments, **files, split=split)
    except (OSError, ValueError) as error:  # it is not there, not to be reached, or has no such split
        raise NotFoundError(kind="text", name=name, remedy=f"{_REMEDY} ({error})") from error
    if dataset.column not in rows.column_names:
        kind = f"column {dataset.column!r} in"
        raise NotFoundError(kind=kind, name=name, remedy=f"It has {', '.join(rows.column_names)}.")
    if split == "test" and dataset.test_rows is not None:
        rows = rows.select(range(min(dataset.test_rows, len(rows))))
    texts = rows[dataset.column]
    ends = accumulate(map(len, texts))
    return dataset.separator.join(text for text, end in zip(texts, ends, strict=True) if end <= MAX_CHARACTERS)


def most_windows(name: str) -> int | None:
    """Return how many windows of a text are measured, if the protocol does not take them all."""
    return DATASETS[name].test_windows if name in DATASETS else None


_REMEDY = f"Give a text file, {', '.join(map(repr, DATASETS))}, a dataset on the Hugging Face hub or 'pydoc'."


def fingerprint(text: str) -> str:
    """Return the SHA-256 of a text, to tell whether two runs read the same."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_windows(text: str, tokenizer: Any, length: int, count: int | None = None) -> torch.Tensor:
    """Tokenise the whole text and cut it into windows; the tail that fills none is dropped.

    Returns:
        int64 token ids of shape [windows, length]; the first ``count`` windows if given.

    Raises:
        OptionError: the text does not fill one window.
    """
    token_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    total = len(token_ids)
    if total < length:
        raise OptionError(name="window_length", value=length, reason=f"the text has only {total} tokens")
    return token_ids[: total - total % length].view(-1, length)[:count]
