"""Shards: safetensors files of a folder, and the index that names them.

A shard is written under a name that follows from its content, so that none that an index names is ever overwritten;
then the index is replaced, in one step; then what no index names is removed. Whenever that is cut short, the folder
holds the checkpoint from before or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quarot_fx.checkpoint.damage import damaged
from quarot_fx.checkpoint.manifest import DTYPE_NAMES, Manifest, Shard, TensorInfo
from quarot_fx.errors import CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError, SaveError
from quarot_fx.files import TEMPORARY, put_in_place, sync_folder, write_text

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-[0-9a-f]{16}\.safetensors")


class ShardWriter:
    """Writes tensors to shards of about a size, each as soon as it is full.

    Args:
        folder: is made if it is not there.
        size: bytes of a shard; a tensor that is bigger gets a shard of its own.

    Attributes:
        tensors, shards: what was written.

    Raises:
        SaveError: the folder holds weights that are not ours.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._pending: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.shards: dict[str, Shard] = {}
        _check_writable(folder)

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Add a tensor, and return the name that it gets: its own, or one with a number if that is taken.

        Raises:
            SaveError: safetensors has no such dtype.
        """
        if tensor.dtype not in DTYPE_NAMES:
            remedy = "Convert it to a floating-point or integer dtype first."
            raise SaveError(folder=str(self._folder), reason=f"{name} is of {tensor.dtype}", remedy=remedy)
        taken = self.tensors.keys() | self._pending.keys()
        name = next(one for one in (name, *(f"{name}.{i}" for i in range(2, len(taken) + 3))) if one not in taken)
        if self._pending and sum(one.nbytes for one in self._pending.values()) + tensor.nbytes > self._size:
            self._write()
        self._pending[name] = _owned(tensor)
        return name

    def finish(self) -> None:
        """Write what is left."""
        if self._pending or not self.shards:
            self._write()
        sync_folder(self._folder)

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=TEMPORARY, dir=self._folder)
        os.close(handle)
        save_file(self._pending, path, metadata={"format": "pt"})
        digest = _sync(path)
        name = f"model-{len(self.shards) + 1:05}-{digest[:16]}.safetensors"
        self.shards[name] = Shard(os.path.getsize(path), digest)
        put_in_place(path, self._folder / name)
        for tensor, value in self._pending.items():
            self.tensors[tensor] = TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape), name)
        self._pending = {}


def commit(folder: Path, manifest: Manifest) -> None:
    """Make what was written the checkpoint of a folder, and remove the one before."""
    write_text(folder / INDEX, json.dumps(manifest.as_index(), indent=1) + "\n")
    for path in folder.iterdir():
        is_old = _SHARD.fullmatch(path.name) is not None and path.name not in manifest.shards
        if is_old or path.name.startswith(TEMPORARY):
            path.unlink()


def read_manifest(folder: Path) -> Manifest:
    """Read the index of a folder.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointFormatError: it is no index of ours.
        CheckpointVersionError: it is in another format.
    """
    try:
        text = (folder / INDEX).read_text(encoding="utf-8")
    except OSError as error:
        remedy = "Give a folder that quarot_fx.save wrote."
        raise CheckpointNotFoundError(folder=str(folder), reason=f"it has no {INDEX}", remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise _no_json(folder, error) from error
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(folder, error) from error
    return Manifest.from_index(index, str(folder))


class ShardReader:
    """Reads tensors of a checkpoint, whose files it keeps open.

    Raises:
        CorruptCheckpointError: a file is missing, cut short, or not the one that was written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._tensors = folder, manifest.tensors
        self._files: dict[str, Any] = {}
        for name, shard in manifest.shards.items():
            self._check_file(name, shard)
            try:
                self._files[name] = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._corrupt(f"{name} is no safetensors file: {error}") from error
        for name, info in self._tensors.items():
            self._check_tensor(name, info)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU; its memory may be that of the file."""
        tensor: torch.Tensor = self._files[self._tensors[name].shard].get_tensor(name)
        return tensor

    def _check_file(self, name: str, shard: Shard) -> None:
        path = self._folder / name
        if not path.is_file():
            raise self._corrupt(f"{name} is missing")
        if (size := path.stat().st_size) != shard.size:
            raise self._corrupt(f"{name} has {size} bytes, and {shard.size} were written")
        if _digest(path) != shard.sha256:
            raise self._corrupt(f"{name} is not what was written: its checksum differs")

    def _check_tensor(self, name: str, info: TensorInfo) -> None:
        file = self._files[info.shard]
        if name not in list(file.keys()):
            raise self._corrupt(f"{info.shard} has no {name}")
        found = file.get_slice(name)
        layout = found.get_dtype(), tuple(found.get_shape())
        if layout != (info.dtype, info.shape):
            raise self._corrupt(f"{name} is {layout[0]} {list(layout[1])}, not {info.dtype} {list(info.shape)}")

    def _corrupt(self, reason: str) -> CorruptCheckpointError:
        remedy = "Copy or download it again, or save it again."
        return CorruptCheckpointError(folder=str(self._folder), reason=reason, remedy=remedy)


def _check_writable(folder: Path) -> None:
    """Refuse a folder in which other programs would read other weights than ours."""
    if folder.exists() and not folder.is_dir():
        raise SaveError(folder=str(folder), reason="it is a file", remedy="Give a folder.")
    others = [path.name for path in folder.glob("*.safetensors") if not _SHARD.fullmatch(path.name)]
    others += [path.name for path in folder.glob("*.bin")]
    if (folder / INDEX).exists() and not others:
        try:
            read_manifest(folder)
        except CheckpointFormatError:
            others.append(INDEX)
    if others:
        reason = f"it holds weights of another kind: {', '.join(sorted(others))}"
        raise SaveError(folder=str(folder), reason=reason, remedy="Give a new folder.")


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU that shares its memory with no other."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return tensor.cpu().contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: str) -> str:
    """Let a file reach the disk, and return its digest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _no_json(folder: Path, error: Exception) -> CheckpointFormatError:
    return damaged(str(folder), f"{INDEX} is no JSON: {error}")
