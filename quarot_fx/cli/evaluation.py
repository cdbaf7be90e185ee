"""What ``quarot-fx eval`` does under each setting: prepare the model, compile it, and measure it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quarot_fx.cli.chunks import InChunks, cache_options
from quarot_fx.cli.models import compile_model
from quarot_fx.cli.needles import Needles
from quarot_fx.cli.preparation import CalibrationWindows, prepare
from quarot_fx.cli.settings import Setting
from quarot_fx.cli.tasks import Tasks
from quarot_fx.cli.windows import TextWindows
from quarot_fx.errors import QuarotError


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a model, and how.

    Attributes:
        network: the model.
        tokenizer: the model's.
        text: what it reads, if anything.
        tasks: what it is asked, if anything.
        chunk: tokens of the text that it gets at a time, through a KV cache; ``None`` is all, without a cache.
        calibration: what settings that need it are calibrated on.
        nested_backend: what compiles the rewritten graph.
    """

    network: Any
    tokenizer: Any
    text: TextWindows | Needles | None
    tasks: Tasks | None
    chunk: int | None
    calibration: CalibrationWindows | None
    nested_backend: str

    @property
    def title(self) -> str:
        """What is measured, in words."""
        return "; ".join(one.title for one in (self.text, self.tasks) if one is not None)

    @property
    def about(self) -> dict[str, Any]:
        """What is measured, and how, for JSON."""
        about: dict[str, Any] = {}
        for one in (self.text, self.tasks, self.calibration):
            if one is not None:
                about |= one.about
        return {**about, "nested_backend": self.nested_backend}

    def row(self, setting: Setting) -> dict[str, Any]:
        """Return what is measured under a setting, or the ``reason`` why the setting does not fit the model.

        Raises:
            QuarotError: the model as it is cannot be measured.
        """
        row: dict[str, Any] = {"setting": setting.name, "options": setting.options}
        try:
            for part in self._parts(setting):
                row |= part
        except QuarotError as error:
            if setting.options is None:  # it is not the setting that is at fault
                raise
            row["reason"] = str(error)
        return row

    def _parts(self, setting: Setting) -> Iterator[dict[str, Any]]:
        if setting.needs_calibration and self.calibration is not None:
            prepared = prepare(self.network, setting, self.calibration)
            setting = prepared.setting
            yield prepared.results()
        runnable = compile_model(self.network, setting, self.nested_backend)
        if self.text is not None and self.chunk is None:
            yield self.text.measure(runnable, setting.name)
        elif self.text is not None and self.chunk is not None:
            coded = cache_options(setting.options)
            reader = InChunks(runnable, self.network, coded, self.chunk, self.text.longest)
            yield self.text.measure(reader, setting.name)
            yield {"cache": reader.about}
        if self.tasks is not None:
            yield self.tasks.measure(runnable, self.network, self.tokenizer)
