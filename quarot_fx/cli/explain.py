"""``quarot-fx explain``: what the compiler does to a model, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quarot_fx.cli.settings import OptionAssignments, parse_assignments, parse_options, parse_setting
from quarot_fx.errors import OptionError


def explain(
    model: Annotated[str | None, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Plan without weights: a config.json, a folder with one, a model type, a name on the hub."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A field of the config: num_hidden_layers=126."),
    ] = None,
    setting: Annotated[str, typer.Option(help="Such as W4A4KV4, W8A8KV8, KV4 or rotated.")] = "W4A4KV4",
    option: OptionAssignments = None,
    stop_after: Annotated[str | None, typer.Option(help="Name of the last pass to run.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sequence to trace with.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
    graph: Annotated[Path | None, typer.Option(help="Write the rewritten graph here, as Python.")] = None,
) -> None:
    """Print the passes, the rotation plan, and why each linear or cache is or is not rotated."""
    options = parse_setting(setting, parse_options(option)).options
    if options is None:
        raise OptionError(name="setting", value=setting, reason="rewrites nothing; did you mean 'rotated'?")
    network = _build(model, config, parse_assignments(changes or ()))

    import torch

    import quarot_fx

    token_ids = torch.arange(tokens)[None] % network.get_input_embeddings().weight.shape[0]
    rewritten = quarot_fx.rewrite(
        network,
        {"input_ids": token_ids, "use_cache": False},
        stop_after=stop_after,
        **{"check": config is None, **options},
    )
    Console().print(rewritten.quarot)
    if json_file:
        json_file.write_text(json.dumps(rewritten.quarot.as_dict(), indent=2) + "\n", encoding="utf-8")
    if graph:
        graph.write_text(rewritten.print_readable(print_output=False), encoding="utf-8")


def _build(model: str | None, config: str | None, changes: dict[str, Any]) -> Any:
    if (model is None) == (config is None):
        raise OptionError(name="config", value=config, reason="give either a MODEL, with weights, or --config, without")
    if config is not None:
        from quarot_fx.cli.configs import build_on_meta

        return build_on_meta(config, changes)
    if changes:
        raise OptionError(name="set", value=changes, reason="needs --config: a MODEL with weights has its own")

    from quarot_fx.cli.models import load_model

    return load_model(str(model))[0]
