"""Texts by name, and the windows of tokens that perplexity is measured and weights are calibrated on."""

from __future__ import annotations

import hashlib
import importlib
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from quarot_fx.errors import NotFoundError, OptionError
from quarot_fx.extras import import_extra

MAX_CHARACTERS = 2**25  # of a dataset: WikiText-2 thrice, some 7 million tokens
DATASETS: dict[str, dict[str, Any]] = {  # name -> arguments of datasets.load_dataset
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
}


def read_text(name: str, split: str = "test") -> str:
    """Return a file's text, ``"pydoc"`` (English that every Python has), or a split of a dataset.

    Args:
        name: a path, ``"pydoc"``, a name in ``DATASETS``, or ``"OWNER/NAME"`` or ``"OWNER/NAME:CONFIG"`` of a dataset
            on the hub that has a column ``text``.
        split: of a dataset, whose first rows are taken, ``MAX_CHARACTERS`` of them.

    Raises:
        NotFoundError: it is neither.
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
    arguments = DATASETS.get(name, {"path": repository, "name": config or None})
    try:
        rows = datasets.load_dataset(**arguments, split=split)
    except (OSError, ValueError) as error:  # it is not there, not to be reached, or has no such split
        raise NotFoundError(kind="text", name=name, remedy=f"{_REMEDY} ({error})") from error
    if "text" not in rows.column_names:
        raise NotFoundError(kind="column 'text' in", name=name, remedy=f"It has {', '.join(rows.column_names)}.")
    characters = accumulate(map(len, rows["text"]))
    return "\n\n".join(text for text, end in zip(rows["text"], characters, strict=True) if end <= MAX_CHARACTERS)


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
