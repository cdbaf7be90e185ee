"""Learned rotations in a folder: one file of safetensors with the matrices, and one of JSON with all else. What is read
is checked: it may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from quarot_fx.errors import LearnedRotationsFileError, NotOrthogonalError
from quarot_fx.files import TEMPORARY, put_in_place, write_text
from quarot_fx.learning.rotations import LearnedRotation, LearnedRotations
from quarot_fx.rotation import Rotation

INDEX, MATRICES = "rotations.json", "rotations.safetensors"
FORMAT = 1


def write_rotations(rotations: LearnedRotations, folder: Path) -> None:
    """Write a set: first the matrices, then the index that has their checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    os.close(handle)
    save_file({str(one.rotation): one.rotation.matrix() for one in rotations}, path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    put_in_place(path, folder / MATRICES)
    index = {
        "format": FORMAT,
        "name": rotations.name,
        "sha256": digest,
        "rotations": [{"rotation": str(one.rotation), "absorbed_by": one.absorbed_by} for one in rotations],
        "options": rotations.options,
        "losses": rotations.losses,
        "seconds": rotations.seconds,
    }
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def read_rotations(folder: Path) -> LearnedRotations:
    """Read a set.

    Raises:
        LearnedRotationsFileError: there is none, or it is not what was written.
        NotOrthogonalError: a matrix is no rotation.
    """
    index = _index(folder)
    try:
        content = (folder / MATRICES).read_bytes()
    except OSError as error:
        raise _error(folder, f"it has no {MATRICES}", "Copy both files.") from error
    if (version := index.get("format")) != FORMAT:
        raise _error(folder, f"it is in format {version!r}, and this quarot_fx reads {FORMAT}", "Learn them again.")
    if hashlib.sha256(content).hexdigest() != index.get("sha256"):
        raise _error(folder, f"{MATRICES} is not what was written: its checksum differs")
    try:
        matrices = load(content)
    except SafetensorError as error:
        raise _error(folder, f"{MATRICES} cannot be read: {error}") from error
    try:
        learned = [_learned(one, matrices) for one in index["rotations"]]
        losses, seconds = [float(loss) for loss in index["losses"]], float(index["seconds"])
        rotations = LearnedRotations(learned, dict(index["options"]), losses, seconds)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, NotOrthogonalError):
            raise
        raise _error(folder, f"{INDEX} is none: {type(error).__name__}: {error}") from error
    if rotations.name != index.get("name"):
        raise _error(folder, f"it is called {index.get('name')!r}, and its content {rotations.name!r}")
    return rotations


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "Give what quarot_fx.learn_rotations returned, or a folder that its save wrote."
        raise _error(folder, f"there is no {INDEX}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise _error(folder, f"{INDEX} is no JSON: {error}") from error
    if not isinstance(index, dict):
        raise _error(folder, f"{INDEX} is a {type(index).__name__}")
    return index


def _learned(one: dict[str, Any], matrices: dict[str, torch.Tensor]) -> LearnedRotation:
    rotation = Rotation.of_matrix(matrices[one["rotation"]])
    if str(rotation) != one["rotation"]:
        raise ValueError(f"the matrix of {one['rotation']} is that of {rotation}")
    absorbed_by = one["absorbed_by"]
    if not isinstance(absorbed_by, list) or not all(isinstance(absorber, str) for absorber in absorbed_by):
        raise ValueError(f"what absorbs {rotation} is {absorbed_by!r}")
    return LearnedRotation(rotation, tuple(absorbed_by))


def _error(
    folder: Path, reason: str, remedy: str = "It is damaged: copy it again, or learn the rotations again."
) -> LearnedRotationsFileError:
    return LearnedRotationsFileError(folder=str(folder), reason=reason, remedy=remedy)
