"""What an interrupted calibration goes on from: codes in safetensors, one file a step, and a JSON index of them.

The index is replaced as a whole after the file that it names was written, so that it is never ahead of the codes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import fx

from quarot_fx.calibration.calibrated import PackedCodes
from quarot_fx.calibration.report import CalibratedWeight
from quarot_fx.errors import CalibrationStateError
from quarot_fx.extras import import_extra
from quarot_fx.files import write_text
from quarot_fx.store import content, expression

INDEX = "calibration.json"


class CalibrationState:
    """The steps of a calibration that are done, in a folder.

    Args:
        folder: is made if it is not there.
        settings: all that the codes depend on besides the weights, as JSON-able data.

    Raises:
        CalibrationStateError: the folder belongs to a calibration with other settings.
        MissingExtraError: ``safetensors`` is not installed.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self._safetensors = import_extra("safetensors.torch", extra="calibration")
        self._folder, self._index = Path(folder), Path(folder) / INDEX
        self._steps: list[dict[str, Any]] = []
        self._settings = json.loads(json.dumps(settings))
        if not self._index.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            return
        written = json.loads(self._index.read_text(encoding="utf-8"))
        for name, value in self._settings.items():
            if written["settings"].get(name) != value:
                reason = f"it was begun with {name}={written['settings'].get(name)!r}, not {value!r}"
                raise CalibrationStateError(folder=str(folder), reason=reason)
        self._steps = written["steps"]

    def __len__(self) -> int:
        return len(self._steps)

    def load(self, step: int, quantizations: list[fx.Node]) -> tuple[list[PackedCodes], list[CalibratedWeight]]:
        """Return the codes that a step made for ``quarot::quantize_weight`` nodes, and their report.

        Raises:
            CalibrationStateError: the step rounded other weights.
        """
        done = self._steps[step]
        if done["digests"] != [_digest(node) for node in quantizations]:
            names = ", ".join(sorted({record["parameter"] for record in done["weights"]}))
            reason = f"its step {step}, {names}, rounded other weights than this model has there"
            raise CalibrationStateError(folder=str(self._folder), reason=reason)
        tensors = self._safetensors.load_file(self._folder / done["file"])
        parts = [[tensors[f"{i}.{part}"] for part in _PARTS] for i in range(len(quantizations))]
        return [PackedCodes(*one) for one in parts], [CalibratedWeight(**record) for record in done["weights"]]

    def save(self, quantizations: list[fx.Node], codes: list[PackedCodes], weights: list[CalibratedWeight]) -> None:
        """Add a step."""
        name = f"step-{len(self._steps):05}.safetensors"
        tensors = {f"{i}.{part}": getattr(one, part).contiguous() for i, one in enumerate(codes) for part in _PARTS}
        self._safetensors.save_file(tensors, self._folder / name)
        digests = [_digest(node) for node in quantizations]
        self._steps.append({"file": name, "digests": digests, "weights": [asdict(weight) for weight in weights]})
        text = json.dumps({"settings": self._settings, "steps": self._steps}, indent=1)
        write_text(self._index, text + "\n")


_PARTS = ("packed", "scale", "zero")


def _digest(quantization: fx.Node) -> str:
    """Return what identifies a quantised weight across processes: how it is made, and the content of the parameters."""
    made = expression(quantization)
    digest = hashlib.blake2b(str(made.structure).encode())
    for leaf in made.leaves:
        digest.update(content(leaf))
    return digest.hexdigest()
