"""What an interrupted calibration goes on from: codes in safetensors, one file a step, and a JSON index of them.

The index is replaced as a whole after the file that it names was written, so that it is never ahead of the codes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from torch import fx, nn

from quarot_fx.balance import KeyBalances
from quarot_fx.calibration.calibrated import PackedCodes
from quarot_fx.calibration.report import BalancedKeys, CalibratedInput, CalibratedWeight
from quarot_fx.errors import CalibrationStateError
from quarot_fx.extras import import_extra
from quarot_fx.files import write_text
from quarot_fx.store import content, expression

INDEX = "calibration.json"


@dataclass(frozen=True)
class Step:
    """What calibration found for layers that share an input.

    Attributes:
        codes: of the weights that it rounded.
        weights: what became of each matrix.
        inputs: how the input is clipped, if it found that.
    """

    codes: list[PackedCodes]
    weights: list[CalibratedWeight]
    inputs: list[CalibratedInput]


class CalibrationState:
    """The steps of a calibration that are done, in a folder.

    Args:
        folder: is made if it is not there.
        settings: all that the codes depend on besides the weights, as JSON-able data.
        model: that is calibrated.

    Raises:
        CalibrationStateError: the folder belongs to a calibration with other settings.
        MissingExtraError: ``safetensors`` is not installed.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], model: Callable[..., Any]) -> None:
        self._model = model
        self._safetensors = import_extra("safetensors.torch", extra="calibration")
        self._folder, self._index = Path(folder), Path(folder) / INDEX
        self._steps: list[dict[str, Any]] = []
        self._answers: dict[str, Any] = {}
        self._settings = json.loads(json.dumps(settings))
        if not self._index.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            return
        written = json.loads(self._index.read_text(encoding="utf-8"))
        for name, value in self._settings.items():
            if written["settings"].get(name) != value:
                reason = f"it was begun with {name}={written['settings'].get(name)!r}, not {value!r}"
                raise CalibrationStateError(folder=str(folder), reason=reason)
        self._steps, self._answers = written["steps"], written.get("answers", {})

    def __len__(self) -> int:
        return len(self._steps)

    def once(self, question: str, answer: Callable[[], Any]) -> Any:
        """Return JSON-able data that does not depend on the steps, as it was found the first time.

        Raises:
            CalibrationStateError: it was found for other weights.
        """
        if question not in self._answers:
            self._answers[question] = {"answer": answer(), "digest": self._digest_of_model}
            self._write()
        known = self._answers[question]
        if known["digest"] != self._digest_of_model:
            reason = f"{question}: found for other weights than this model has"
            raise CalibrationStateError(folder=str(self._folder), reason=reason)
        return known["answer"]

    @cached_property
    def _digest_of_model(self) -> str:
        digest = hashlib.blake2b()
        model = self._model if isinstance(self._model, nn.Module) else nn.Module()
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            digest.update(name.encode() + (b"" if tensor.is_meta else content(tensor)))
        return digest.hexdigest()

    def balances(
        self, find: Callable[[], tuple[KeyBalances, tuple[BalancedKeys, ...]]]
    ) -> tuple[KeyBalances, tuple[BalancedKeys, ...]]:
        """Return how keys are balanced, as it was found the first time.

        Raises:
            CalibrationStateError: it was found for other weights.
            KeyBalancesFileError: the matrices are no longer there.
        """

        def answer() -> list[dict[str, Any]]:
            balances, keys = find()
            balances.save(self._folder)
            return [asdict(one) for one in keys]

        keys = self.once("balances of keys", answer)
        return KeyBalances.load(self._folder), tuple(BalancedKeys(**one) for one in keys)

    def load(self, step: int, weights: list[fx.Node]) -> Step:
        """Return what a step found.

        Args:
            step: its number.
            weights: of its layers: ``quarot::quantize_weight`` nodes, or other constants.

        Raises:
            CalibrationStateError: the step was about other weights.
        """
        done = self._steps[step]
        if done["digests"] != [_digest(node) for node in weights]:
            parameters = {record["parameter"] for record in done["weights"]}
            parameters.update(name for record in done.get("inputs", ()) for name in record["parameters"])
            names = ", ".join(sorted(parameters))
            reason = f"its step {step}, {names}, was about other weights than this model has there"
            raise CalibrationStateError(folder=str(self._folder), reason=reason)
        tensors = self._safetensors.load_file(self._folder / done["file"])
        parts = [[tensors[f"{i}.{part}"] for part in _PARTS] for i in range(len(tensors) // len(_PARTS))]
        return Step(
            [PackedCodes(*one) for one in parts],
            [CalibratedWeight(**record) for record in done["weights"]],
            [CalibratedInput(**{**one, "parameters": tuple(one["parameters"])}) for one in done.get("inputs", ())],
        )

    def save(self, weights: list[fx.Node], step: Step) -> None:
        """Add a step, about the weights of some layers."""
        name = f"step-{len(self._steps):05}.safetensors"
        tensors = {
            f"{i}.{part}": getattr(one, part).contiguous() for i, one in enumerate(step.codes) for part in _PARTS
        }
        self._safetensors.save_file(tensors, self._folder / name)
        digests = [_digest(node) for node in weights]
        records = {"weights": [asdict(one) for one in step.weights], "inputs": [asdict(one) for one in step.inputs]}
        self._steps.append({"file": name, "digests": digests, **records})
        self._write()

    def _write(self) -> None:
        content = {"settings": self._settings, "answers": self._answers, "steps": self._steps}
        write_text(self._index, json.dumps(content, indent=1) + "\n")


_PARTS = ("packed", "scale", "zero")


def _digest(weight: fx.Node) -> str:
    """Return what identifies a weight across processes: how it is made, and the content of the parameters."""
    made = expression(weight)
    digest = hashlib.blake2b(str(made.structure).encode())
    for leaf in made.leaves:
        digest.update(content(leaf))
    return digest.hexdigest()
