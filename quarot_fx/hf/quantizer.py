"""What ``from_pretrained`` and ``save_pretrained`` do for ``quant_method: quarot``."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from quarot_fx.checkpoint.loading import config_of, fill
from quarot_fx.checkpoint.saving import save
from quarot_fx.checkpoint.shards import ShardReader, read_manifest
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import CheckpointNotFoundError, CheckpointOptionError
from quarot_fx.hf.config import METHOD, QuarotQuantizationConfig


@register_quantizer(METHOD)
class QuarotQuantizer(HfQuantizer):
    """A checkpoint of ours is loaded by us, and any other model is compiled: its weights are quantised when it is
    called first.
    """

    requires_calibration = False

    @property
    def is_compileable(self) -> bool:
        """False: the model compiles itself, prompts included. What transformers would compile around it, decoding only
        and with Inductor, are the weights as they were, which there may not be any more.
        """
        return False

    @property
    def is_trainable(self) -> bool:
        """False: rounding has no gradient."""
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether ``save_pretrained`` works: always."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise CheckpointNotFoundError(folder="", reason="there are no files", remedy="Give a folder or a name.")
        folder = Path(checkpoint_files[0]).parent
        manifest = read_manifest(folder)
        reader = ShardReader(folder, manifest)
        self._checkpoint = folder, manifest, reader, config_of(manifest, reader, str(folder), {})
        self._device = _one_device(device_map, folder)
        self._hidden = _Hidden(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config.quarot  # type: ignore[attr-defined]
        if self.pre_quantized:
            self._hidden.restore()
            folder, manifest, reader, config = self._checkpoint
            fill(model, manifest, reader, str(folder), self._device)
            del self._checkpoint, self._hidden
        model.eval()
        model.compile(backend="quarot", options=config.as_options())
        attach(model, config)


def attach(model: Any, config: QuarotConfig) -> None:
    """Let transformers know that a model is ours: how it is saved, and that it compiles itself."""
    quantization_config = QuarotQuantizationConfig(**config.as_options())
    model.hf_quantizer = QuarotQuantizer(quantization_config, pre_quantized=True)
    model.config.quantization_config = quantization_config
    model.is_quantized, model.quantization_method = True, METHOD
    model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    *,
    max_shard_size: int | str = "2GB",
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **kwargs: Any,
) -> None:
    """Write a checkpoint with ``config.json``, as :func:`quarot_fx.save` does; and push it to the hub, if asked."""
    options = model.config.quantization_config.quarot.of_weights().as_options()
    save(model, save_directory, max_shard_size=max_shard_size, **options)
    if push_to_hub:
        model.push_to_hub(repo_id or Path(save_directory).name, **kwargs)


class _Hidden:
    """A model's parameters and buffers, taken away so that transformers neither allocates nor initialises any."""

    _TELLING = ("all_tied_weights_keys", "_keys_to_ignore_on_load_unexpected")  # what to do with parameters

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tensors = [
            (tensors, name, tensor)
            for module in model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._told = {name: getattr(model, name) for name in self._TELLING}
        for tensors, name, _ in self._tensors:
            tensors[name] = None
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {".*"}
        for module in model.modules():
            module._is_hf_initialized = True

    def restore(self) -> None:
        """Give them back."""
        for tensors, name, tensor in self._tensors:
            tensors[name] = tensor
        for name, value in self._told.items():
            setattr(self._model, name, value)


def _one_device(device_map: Any, folder: Path) -> torch.device:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
    if devices == {"auto"}:
        devices = {"cuda" if torch.cuda.is_available() else "cpu"}
    if len(devices) > 1 or devices & {"disk", "balanced", "balanced_low_0", "sequential"}:
        remedy = "Give one device: device_map='cuda'."
        raise CheckpointOptionError(folder=str(folder), reason=f"device_map={device_map!r} is not one", remedy=remedy)
    return torch.device(devices.pop())
