"""``quarot-fx eval``: the perplexity of the compiled model itself, setting by setting."""

from __future__ import annotations

import gc
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quarot_fx.cli.settings import DEFAULT_SETTINGS, OptionAssignments, parse_options, parse_setting


def evaluate(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    text: Annotated[str, typer.Option(help="A text file, 'wikitext2' or 'pydoc'.")] = "pydoc",
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first N windows.")] = None,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    settings: Annotated[str, typer.Option(help="Names separated by commas.")] = ",".join(DEFAULT_SETTINGS),
    option: OptionAssignments = None,
    nested_backend: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "eager",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Measure perplexity under each setting, next to the float model's on the same windows."""
    options = parse_options(option or ())
    chosen = [parse_setting(name, options) for name in settings.split(",")]

    from quarot_fx.cli.environment import describe_environment
    from quarot_fx.cli.models import compile_model, load_model
    from quarot_fx.cli.perplexity import measure
    from quarot_fx.errors import NotFoundError
    from quarot_fx.text import fingerprint, read_text, split_windows

    content = read_text(text)
    network, tokenizer = load_model(model, device)
    if tokenizer is None:
        raise NotFoundError(kind="tokenizer", name=model, remedy="Perplexity needs the model's tokenizer files.")
    token_ids = split_windows(content, tokenizer, window_length, windows).to(device)

    results: list[dict[str, Any]] = []
    float_perplexity: float | None = None
    for setting in chosen:
        measurement = measure(compile_model(network, setting, nested_backend), token_ids, setting.name)
        gc.collect()  # compiled graphs lie in reference cycles, and the next setting needs their memory
        if setting.options is None:
            float_perplexity = measurement.perplexity
        results.append({"setting": setting.name, "options": setting.options, **asdict(measurement)})
    for result in results:
        result["ratio"] = result["perplexity"] / float_perplexity if float_perplexity else None

    Console().print(_table(results, f"{model}: {text}, {len(token_ids)} windows of {window_length} tokens"))
    if json_file:
        record = {
            "command": shlex.join(["quarot-fx", *sys.argv[1:]]),
            "model": model,
            "text": {"name": text, "sha256": fingerprint(content)},
            "windows": len(token_ids),
            "window_length": window_length,
            "nested_backend": nested_backend,
            **describe_environment(device),
            "results": results,
        }
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _table(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("setting", no_wrap=True)
    for column in ("perplexity", "ratio to float", "seconds", "of it first window"):
        table.add_column(column, justify="right")
    for result in results:
        ratio = "" if result["ratio"] is None else f"{result['ratio']:.5g}"
        seconds = (f"{result['seconds']:.1f}", f"{result['first_seconds']:.1f}")
        table.add_row(result["setting"], f"{result['perplexity']:.6g}", ratio, *seconds)
    return table
