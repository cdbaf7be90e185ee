"""Windows of a text, what is to be said of them, and a model's perplexity on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from quarot_fx.cli.perplexity import measure
from quarot_fx.text import fingerprint, most_windows, split_windows


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text, whose perplexity is to be measured.

    Attributes:
        name: of the text.
        sha256: of the text.
        token_ids: int64 [windows, length].
        batch: windows that a model gets at a time.
    """

    name: str
    sha256: str
    token_ids: torch.Tensor
    batch: int

    @classmethod
    def of_text(
        cls, name: str, text: str, tokenizer: Any, length: int, count: int | None, batch: int, device: str
    ) -> TextWindows:
        """Cut a text; ``count`` windows of it, or as many as the protocol takes.

        Raises:
            OptionError: the text does not fill one window.
        """
        token_ids = split_windows(text, tokenizer, length, count or most_windows(name)).to(device)
        return cls(name, fingerprint(text), token_ids, batch)

    @property
    def title(self) -> str:
        """What is measured, in words."""
        windows, length = self.token_ids.shape
        return f"{self.name}, {windows} windows of {length} tokens"

    @property
    def about(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        windows, length = self.token_ids.shape
        return {"text": {"name": self.name, "sha256": self.sha256}, "windows": windows, "window_length": length}

    @property
    def longest(self) -> int:
        """Tokens of a window."""
        return self.token_ids.shape[1]

    def measure(self, model: Any, label: str) -> dict[str, Any]:
        """Return the fields of a :class:`Measurement` of a model, for JSON; shows progress."""
        return asdict(measure(model, self.token_ids, label, self.batch))
