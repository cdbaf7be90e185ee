"""Windows of a text, and what is to be said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text, whose perplexity is to be measured.

    Attributes:
        name: of the text.
        sha256: of the text.
        token_ids: int64 [windows, length].
    """

    name: str
    sha256: str
    token_ids: torch.Tensor

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
