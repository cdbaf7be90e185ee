"""What weights are calibrated on: token ids, from a tensor, a text file or a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quarot_fx.errors import CalibrationDataError
from quarot_fx.text import read_text, split_windows

Data = Tensor | Sequence[Tensor] | str


def calibration_tokens(data: Data, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Return token ids [n, length].

    Args:
        data: token ids [n, length] or a list of such of one length, all of which are used as they are; or the name of a
            text, a file or a dataset, as :func:`quarot_fx.text.read_text` takes it, of whose train split it is.
        tokenizer: of a text, as transformers calls it.
        samples: number of windows that are drawn from a text at random.
        length: tokens in a window of a text.
        seed: of the draw.

    Raises:
        CalibrationDataError: sequences are not of one length, tokens are not integers, a text comes without a tokenizer
            or has too few windows.
        NotFoundError: there is no such text.
        MissingExtraError: a dataset was asked for and ``datasets`` is not installed.
    """
    if isinstance(data, str):
        return _draw(data, tokenizer, samples, length, seed)
    sequences = [data] if isinstance(data, Tensor) else list(data)
    rows = [sequence[None] if sequence.ndim == 1 else sequence for sequence in sequences]
    lengths = {row.shape[-1] for row in rows}
    if len(lengths) != 1 or any(row.ndim != 2 or not len(row) for row in rows):
        shapes = ", ".join(str(list(sequence.shape)) for sequence in sequences[:4]) or "nothing"
        remedy = "Cut them to one length: the model is traced once, for one shape."
        raise CalibrationDataError(reason=f"sequences have shapes {shapes}", remedy=remedy)
    tokens = torch.cat(rows)
    if tokens.is_floating_point() or tokens.is_complex():
        raise CalibrationDataError(reason=f"tokens are {tokens.dtype}", remedy="Give token ids, which are integers.")
    return tokens


def _draw(name: str, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    if tokenizer is None:
        remedy = "Give tokenizer=AutoTokenizer.from_pretrained(...), or token ids."
        raise CalibrationDataError(reason=f"{name!r} is a text, and there is no tokenizer", remedy=remedy)
    windows = split_windows(read_text(name, split="train"), tokenizer, length)
    if len(windows) < samples:
        reason = f"{name!r} has {len(windows)} windows of {length} tokens, not {samples}"
        raise CalibrationDataError(reason=reason, remedy="Ask for fewer samples, or shorter ones, or give more text.")
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[drawn.sort().values]
