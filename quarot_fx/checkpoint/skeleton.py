"""Models of transformers without weights, from what a checkpoint says about them: a class of transformers itself and
its config. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quarot_fx.config import QuarotConfig
from quarot_fx.extras import import_extra
from quarot_fx.files import write_text

# What a config does not write to its file, and the values that make transformers download no code.
IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
}


def describe(model: torch.nn.Module) -> dict[str, Any] | None:
    """Return what :func:`build` makes a model of again, JSON-able; ``None`` if it is no model of transformers."""
    if not type(model).__module__.startswith("transformers."):
        return None
    config: Any = model.config
    generation_config: Any = getattr(model, "generation_config", None)
    return {
        "class": type(model).__name__,
        "config": _without_quantization(config.to_dict()),
        "generation_config": None if generation_config is None else _jsonable(generation_config.to_dict()),
        **{name: chosen for name in IMPLEMENTATIONS if (chosen := getattr(config, f"_{name}", None)) is not None},
    }


def build(description: Mapping[str, Any], fail: Callable[[str], Exception]) -> torch.nn.Module:
    """Return a model on the meta device, in evaluation mode.

    Args:
        description: what :func:`describe` returned, from wherever.
        fail: makes the error for a description of no model, given the reason.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = import_extra("transformers", extra="models")
    name, fields = description.get("class"), description.get("config")
    model_class: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not _is_subclass(model_class, transformers.PreTrainedModel):
        raise fail(f"transformers {transformers.__version__} has no model {name!r}")
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or model_type not in transformers.CONFIG_MAPPING:
        raise fail(f"transformers {transformers.__version__} has no config for {model_type!r}")
    chosen = {name: description[name] for name in IMPLEMENTATIONS if name in description}
    for name, implementation in chosen.items():
        if implementation not in IMPLEMENTATIONS[name]:
            raise fail(f"{name}={implementation!r} is none of {', '.join(IMPLEMENTATIONS[name])}")
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(_without_quantization(fields))
        with torch.device("meta"):
            dtype = getattr(config, "dtype", None)
            model = model_class._from_config(config, **({"dtype": dtype} if dtype else {}), **chosen)
        if isinstance(description.get("generation_config"), dict):
            model.generation_config = transformers.GenerationConfig.from_dict(description["generation_config"])
    except Exception as error:  # what a config checks, and what it raises, is its own affair
        raise fail(f"{name} cannot be built from its config: {type(error).__name__}: {error}") from error
    evaluated: torch.nn.Module = model.eval()
    return evaluated


def _is_subclass(one: Any, base: type) -> bool:
    return isinstance(one, type) and issubclass(one, base)


def write_configs(model: torch.nn.Module, config: QuarotConfig, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``, by which ``from_pretrained`` knows a model."""
    description = describe(model)
    if description is None:
        return
    # Matrices are in the shards, and transformers makes a config of these options before it knows where those are.
    options = replace(config.of_weights(), learned_rotations=None, key_balance=None).as_options()
    written = {
        **description["config"],
        "architectures": [description["class"]],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": {"quant_method": "quarot", **options},
    }
    write_text(folder / "config.json", json.dumps(written, indent=2) + "\n")
    if description["generation_config"] is not None:
        write_text(folder / "generation_config.json", json.dumps(description["generation_config"], indent=2) + "\n")


def example_inputs(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return inputs to trace a causal language model of transformers with: a prompt without a cache and, where the
    model can be compiled with one, a prompt and a token with a static cache. There are none for any other model.
    """
    embeddings = None
    if type(model).__module__.startswith("transformers."):
        with suppress(NotImplementedError, AttributeError):
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if embeddings is None:
        return []
    prompt = torch.arange(16, device=embeddings.weight.device)[None] % embeddings.weight.shape[0]
    inputs: list[dict[str, Any]] = [{"input_ids": prompt, "use_cache": False}]
    if getattr(model, "_can_compile_fullgraph", False):
        static_cache = import_extra("transformers", extra="models").StaticCache
        inputs += [
            {"input_ids": tokens, "past_key_values": static_cache(config=model.config, max_cache_len=32)}
            for tokens in (prompt, prompt[:, :1])
        ]
    return inputs


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _jsonable(config).items() if name not in ("quantization_config", "auto_map")}


def _jsonable(value: Any) -> Any:
    """Return data as JSON has it: dtypes by name, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(name): _jsonable(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(one) for one in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
