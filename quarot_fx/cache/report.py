"""What each layer of a cache stores, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quarot_fx.printed import Printed

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerReport:
    """What one layer stores.

    Attributes:
        index: of the layer.
        kind: what it keeps: a number of tokens, a window of them, or the name of a class of transformers.
        k_bits, v_bits: bits of keys and values; ``None`` where the layer is not ours.
        nbytes: bytes that are allocated.
        dense_nbytes: bytes of as many keys and values in bfloat16; of other layers, ``nbytes``.
        reason: why the layer is not ours, or keeps 16 bits, or has no tensors; empty otherwise.
        uncompiled_tokens: that came, since the last reset, from a model that was not compiled.
    """

    index: int
    kind: str
    k_bits: int | None
    v_bits: int | None
    nbytes: int
    dense_nbytes: int
    reason: str = ""
    uncompiled_tokens: int = 0


@dataclass(frozen=True)
class CacheReport(Printed):
    """What a cache stores, layer by layer."""

    layers: tuple[LayerReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a cache in bfloat16 takes."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def uncompiled_tokens(self) -> int:
        """Tokens that came from a model that was not compiled. Its weights and activations are not of few bits."""
        return max((layer.uncompiled_tokens for layer in self.layers), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self) | {"nbytes": self.nbytes, "dense_nbytes": self.dense_nbytes}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table(title="KV cache", title_justify="left")
        table.add_column("layers", overflow="fold")
        for column in ("keeps", "bits"):
            table.add_column(column)
        for column in ("stored", "in bfloat16"):
            table.add_column(column, justify="right")
        table.add_column("because", overflow="fold")
        alike: dict[tuple[str, str, str], list[LayerReport]] = {}
        for layer in self.layers:
            bits = "" if layer.k_bits is None else f"K{layer.k_bits} V{layer.v_bits}"
            alike.setdefault((layer.kind, bits, layer.reason), []).append(layer)
        for (kind, bits, reason), layers in alike.items():
            sizes = (sum(layer.nbytes for layer in layers), sum(layer.dense_nbytes for layer in layers))
            numbers = _ranges([layer.index for layer in layers])
            table.add_row(numbers, kind, bits, *map(mebibytes, sizes), reason)
        ratio = self.dense_nbytes / max(self.nbytes, 1)
        total = f"{mebibytes(self.nbytes)}, in bfloat16 {mebibytes(self.dense_nbytes)} ({ratio:.2f}x)"
        lines = [total if self.nbytes else "nothing is allocated yet"]
        if self.uncompiled_tokens:
            lines.append(f"{self.uncompiled_tokens} tokens came from the model as it is, not from a compiled one")
        return Group(table, *lines)

    def summary(self) -> str:
        """Say it in a line: ``"24 x (1024 tokens), 4 x (LinearAttentionLayer); 3.4 MiB, in bfloat16 12.0 MiB"``."""
        kinds = Counter(layer.kind for layer in self.layers)
        text = ", ".join(f"{count} x ({kind})" for kind, count in kinds.items())
        return f"{text}; {mebibytes(self.nbytes)}, in bfloat16 {mebibytes(self.dense_nbytes)}"


def mebibytes(count: int) -> str:
    """Write a number of bytes: ``"1,536.0 MiB"``."""
    return f"{count / 2**20:,.1f} MiB"


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers: ``"0-3, 5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
