"""Build the models that ``explain --config`` plans: from a config alone, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quarot_fx.errors import NotCausalLMError, NotFoundError, OptionError, UnknownOptionError, nearest
from quarot_fx.extras import import_extra

_REMEDY = "Give a config.json, a folder with one, a model type that transformers knows, or a name on the hub."


def build_on_meta(name: str, changes: Mapping[str, Any]) -> Any:
    """Build a causal language model without weights, in evaluation mode and in the dtype that its config names.

    Args:
        name: a config file, a folder with a ``config.json``, a model type such as ``"llama"``, or a name on the hub,
            of which nothing but the config is downloaded.
        changes: fields of the config to set.

    Raises:
        MissingExtraError: transformers is not installed.
        NotFoundError: there is no such config, or no such model type; the nearest is suggested.
        UnknownOptionError: a change names no field of the config; the nearest is suggested.
        OptionError: the config refuses a value.
        NotCausalLMError: transformers has no causal language model for the config.
    """
    transformers = import_extra("transformers", extra="models")
    config = _load_config(transformers, name, changes)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotCausalLMError(name=name, model_type=config.model_type)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


def _load_config(transformers: Any, name: str, changes: Mapping[str, Any]) -> Any:
    is_model_type = name in transformers.CONFIG_MAPPING and not Path(name).exists()
    written = {"model_type": name} if is_model_type else _read_config(transformers, name)
    model_type = str(written.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        remedy = f"{name} names it.{nearest(model_type, transformers.CONFIG_MAPPING)}"
        raise NotFoundError(kind="model type", name=model_type, remedy=remedy)
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = {field for field in vars(_make(config_class, name, written)) if not field.startswith("_")}
    for field in changes:
        if field not in known:
            raise UnknownOptionError("field of the config", field, known)
    return _make(config_class, name, {**written, **changes})


def _read_config(transformers: Any, name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.exists() and (path.suffix == ".json" or path.is_absolute() or name.startswith(".")):
        raise NotFoundError(kind="config", name=name, remedy=_REMEDY)
    try:
        written, _ = transformers.PreTrainedConfig.get_config_dict(name, local_files_only=path.exists())
    except (OSError, ValueError) as error:
        hint = nearest(name, transformers.CONFIG_MAPPING)
        raise NotFoundError(kind="config", name=name, remedy=f"{_REMEDY}{hint} ({error})") from error
    return written


def _make(config_class: Any, name: str, fields: Mapping[str, Any]) -> Any:
    try:
        return config_class(**fields)
    except Exception as error:  # what a config checks, and what it raises, is its own affair
        reason = f"{config_class.__name__} refuses it: {error}"
        raise OptionError(name="config", value=name, reason=reason) from error
