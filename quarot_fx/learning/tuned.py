"""What tuning found: as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quarot_fx.learning.options import TuningOptions
from quarot_fx.printed import Printed

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class TunedScales(Printed):
    """How far a model's predictions are off with scales as they were, and with tuned ones.

    Attributes:
        options: for ``torch.compile(model, backend="quarot", options=...)``; that of weights is ``"tuned"``.
        tuning: options of tuning.
        weights: whose scales were tuned.
        scales: of all of them.
        losses: in each step, in nats per token.
        held_out: by steps taken, the loss on sequences that nothing was tuned on.
        seconds: all that it took.
    """

    options: dict[str, Any]
    tuning: TuningOptions
    weights: int
    scales: int
    losses: tuple[float, ...]
    held_out: dict[int, float]
    seconds: float

    @property
    def kept(self) -> int:
        """Steps after which the scales were best on what was held out; 0 keeps them as they were."""
        return min(self.held_out, key=self.held_out.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table()
        for column in ("steps", "divergence held out", ""):
            table.add_column(column, justify="right")
        for steps, loss in self.held_out.items():
            table.add_row(str(steps), f"{loss:.4f}", "kept" if steps == self.kept else "")
        count = f"{self.scales:,} scales of {self.weights} weights tuned, {self.seconds:.1f} s"
        return Group("tuned scales: divergence from the float model's predictions, nats a token", table, count)
