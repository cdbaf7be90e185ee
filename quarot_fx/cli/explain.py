"""``quarot-fx explain``: what the compiler does to a model, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quarot_fx.cli.settings import OptionAssignments, parse_options, parse_setting
from quarot_fx.errors import OptionError


def explain(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    setting: Annotated[str, typer.Option(help="Such as W4A4KV4, W8A8KV8, KV4 or rotated.")] = "W4A4KV4",
    option: OptionAssignments = None,
    stop_after: Annotated[str | None, typer.Option(help="Name of the last pass to run.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sequence to trace with.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
    graph: Annotated[Path | None, typer.Option(help="Write the rewritten graph here, as Python.")] = None,
) -> None:
    """Print the passes, the rotation plan, and why each linear or cache is or is not rotated."""
    options = parse_setting(setting, parse_options(option or ())).options
    if options is None:
        raise OptionError(name="setting", value=setting, reason="rewrites nothing; did you mean 'rotated'?")

    import torch

    import quarot_fx
    from quarot_fx.cli.models import load_model

    network, _ = load_model(model)
    token_ids = torch.arange(tokens)[None] % network.get_input_embeddings().weight.shape[0]
    rewritten = quarot_fx.rewrite(
        network, {"input_ids": token_ids, "use_cache": False}, stop_after=stop_after, **{"check": True, **options}
    )
    Console().print(rewritten.quarot)
    if json_file:
        json_file.write_text(json.dumps(rewritten.quarot.as_dict(), indent=2) + "\n", encoding="utf-8")
    if graph:
        graph.write_text(rewritten.print_readable(print_output=False), encoding="utf-8")
