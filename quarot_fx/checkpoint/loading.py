"""``quarot_fx.load``: a model whose graphs find their constants in a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quarot_fx.checkpoint.balances import read_balances
from quarot_fx.checkpoint.learned import read_learned
from quarot_fx.checkpoint.manifest import DTYPES, Codes, Manifest, ModelTensor, Value
from quarot_fx.checkpoint.saved import SavedValues, remember
from quarot_fx.checkpoint.shards import ShardReader, read_manifest
from quarot_fx.checkpoint.skeleton import build
from quarot_fx.config import OF_THE_RUN, QuarotConfig
from quarot_fx.errors import ArchitectureError, CheckpointFormatError, CheckpointOptionError, QuarotError
from quarot_fx.row_blocks import row_blocks
from quarot_fx.store import without_content


def load(
    folder: str | Path,
    model: torch.nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    dynamic: bool | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Return the model that a folder holds, compiled, in evaluation mode.

    Nothing in the folder is run: it is data, which is checked against its checksums, sizes and dtypes. Constants are
    read when the model is called first, so that the folder has to stay until then. Weights that only constants were
    made of read as NaN: the model runs compiled, and not otherwise.

    Args:
        folder: what :func:`~quarot_fx.save` wrote.
        model: for which the checkpoint was made, on any device, with any weights: these are replaced. Not needed for
            models of transformers.
        device: where the weights go.
        dynamic: as of ``torch.compile``.
        options: of the run, such as ``nested_backend``, ``mode`` and ``kernels``; any other has to be the checkpoint's.

    Raises:
        CheckpointNotFoundError: there is no checkpoint in the folder.
        CheckpointFormatError: its index says something that cannot be.
        CheckpointVersionError: it is in a format of another version.
        CorruptCheckpointError: a file is missing, cut short, or not what was written.
        ArchitectureError: it belongs to another model.
        CheckpointOptionError: an option contradicts those that it was made with.
    """
    manifest = read_manifest(Path(folder))
    reader = ShardReader(Path(folder), manifest)
    config = config_of(manifest, reader, str(folder), options)
    if model is None:
        if manifest.transformers is None:
            reason = f"it is of {manifest.model_class}, which is no class of transformers"
            raise ArchitectureError(folder=str(folder), reason=reason, remedy="Give such a model: load(folder, model).")
        model = build(manifest.transformers, lambda reason: _other(folder, reason))
    fill(model, manifest, reader, str(folder), torch.device(device))
    model.eval()
    model.compile(backend="quarot", dynamic=dynamic, options=config.as_options())
    if manifest.transformers is not None:
        from quarot_fx.hf.quantizer import attach

        attach(model, config)
    return model


def fill(model: torch.nn.Module, manifest: Manifest, reader: ShardReader, folder: str, device: torch.device) -> None:
    """Replace all parameters and buffers of a model by those of a checkpoint, and tie those that were one.

    Raises:
        ArchitectureError: the model has other ones.
    """
    check_fits(model, manifest, folder)
    values = SavedValues(folder, config_of(manifest, reader, folder, {}), _readers(manifest, reader))
    like = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made = {}
    for name in sorted(manifest.model, key=lambda name: -_size(manifest.model[name])):  # one buffer for what is absent
        made[name] = _tensor(name, manifest.model[name], like[name], reader, device)
        remember(made[name], name, values)
    for name in (*manifest.model, *manifest.tied):
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        tensor = made[manifest.tied.get(name, name)]
        (owner._parameters if isinstance(tensor, torch.nn.Parameter) else owner._buffers)[attribute] = tensor  # type: ignore[assignment]


def check_fits(model: torch.nn.Module, manifest: Manifest, folder: str) -> None:
    """Raise :class:`ArchitectureError` if a model is not the one that a checkpoint was made of."""
    if type(model).__qualname__ != manifest.model_class:
        raise _other(folder, f"it is of {manifest.model_class}, and the model is a {type(model).__qualname__}")
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    expected = {name: manifest.model[manifest.tied.get(name, name)] for name in (*manifest.model, *manifest.tied)}
    for name in sorted(found.keys() - expected.keys()):
        raise _other(folder, f"it has no {name}, which the model has{_nearest(name, expected)}")
    for name, one in sorted(expected.items()):
        if name not in found:
            raise _other(folder, f"the model has no {name}, which it has{_nearest(name, found)}")
        if tuple(found[name].shape) != one.shape:
            raise _other(folder, f"its {name} is {list(one.shape)}, and the model's is {list(found[name].shape)}")


def _tensor(name: str, one: ModelTensor, like: torch.Tensor, reader: ShardReader, device: torch.device) -> torch.Tensor:
    layout = torch.empty_strided(one.shape, one.stride, dtype=DTYPES[one.dtype], device="meta")
    if isinstance(like, torch.nn.Parameter):
        layout = torch.nn.Parameter(layout, like.requires_grad and layout.is_floating_point())
    if one.stored is None:
        return without_content(layout, device, name)
    data = torch.empty_strided(one.shape, one.stride, dtype=DTYPES[one.dtype], device=device)
    data.copy_(reader.read(one.stored))
    return torch.nn.Parameter(data, layout.requires_grad) if isinstance(like, torch.nn.Parameter) else data


def _readers(manifest: Manifest, reader: ShardReader) -> dict[tuple[str, ...], Callable[..., Any]]:
    def of_value(one: Value) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: reader.read(one.tensor).to(device)

    def of_codes(one: Codes) -> Callable[[torch.device], tuple[torch.Tensor, ...]]:
        def read(device: torch.device) -> tuple[torch.Tensor, ...]:
            packed, scale = reader.read(one.packed).to(device), reader.read(one.scale).to(device)
            signed = one.zero is None
            zero = scale.new_empty(0, dtype=torch.uint8) if one.zero is None else reader.read(one.zero).to(device)
            codes = torch.empty(
                *packed.shape[:-1], one.size, dtype=torch.int8 if signed else torch.uint8, device=device
            )
            for rows in row_blocks(codes.shape):  # its steps take eight bytes a code
                codes[rows] = torch.ops.quarot.unpack(packed[rows], one.bits, one.size, signed)
            return codes, scale, zero

        return read

    return {
        **{one.how: of_value(one) for one in manifest.values},
        **{one.how: of_codes(one) for one in manifest.codes},
    }


def config_of(manifest: Manifest, reader: ShardReader, folder: str, options: Mapping[str, Any]) -> QuarotConfig:
    """Return the config of a checkpoint, with the options that a run may choose.

    Raises:
        CheckpointOptionError: an option is none of these.
        CheckpointFormatError: its own options are none.
    """
    read_learned(manifest, reader, folder)
    read_balances(manifest, reader, folder)
    try:
        of_weights = {name: value for name, value in manifest.options.items() if name not in OF_THE_RUN}
        made_with = QuarotConfig.from_options(of_weights)
    except (QuarotError, TypeError, ValueError) as error:
        remedy = "It is damaged, or a newer quarot_fx made it."
        raise CheckpointFormatError(folder=folder, reason=f"its options are none: {error}", remedy=remedy) from error
    for name in ("check", "free_originals"):
        if options.get(name):
            remedy = "Give it when the checkpoint is made."
            raise CheckpointOptionError(folder=folder, reason=f"{name}=True needs the original weights", remedy=remedy)
    config = QuarotConfig.from_options({**made_with.as_options(), **options})
    for name in options:
        wanted, have = getattr(config.of_weights(), name, None), getattr(made_with, name, None)
        if wanted != have:
            reason = f"it was made with {name}={have!r}, not {wanted!r}"
            raise CheckpointOptionError(folder=folder, reason=reason, remedy="Leave the option out, or save it again.")
    return config


def _size(one: ModelTensor) -> int:
    size = DTYPES[one.dtype].itemsize
    for length in one.shape:
        size *= length
    return size


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (the nearest is {close[0]})" if close else ""


def _other(folder: str | Path, reason: str) -> ArchitectureError:
    return ArchitectureError(folder=str(folder), reason=reason, remedy="Give the model that it was made of.")
