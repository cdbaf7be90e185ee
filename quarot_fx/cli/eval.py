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

from quarot_fx.cli.settings import (
    DEFAULT_SETTINGS,
    OptionAssignments,
    parse_gptq_options,
    parse_options,
    parse_setting,
)
from quarot_fx.errors import NotFoundError, OptionError


def evaluate(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    text: Annotated[str, typer.Option(help="A text file, a dataset such as 'wikitext2', or 'pydoc'.")] = "pydoc",
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first N windows.")] = None,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Windows that the model gets at a time.")] = 1,
    settings: Annotated[str, typer.Option(help="Names separated by commas.")] = ",".join(DEFAULT_SETTINGS),
    option: OptionAssignments = None,
    calibration: Annotated[
        str | None, typer.Option(help="What settings with -gptq are calibrated on: a text file, 'wikitext2', 'c4', ...")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows, as long as the others.")] = 128,
    gptq: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A field of GPTQOptions: act_order=True.")
    ] = None,
    nested_backend: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "eager",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers here, after every setting.")
    ] = None,
) -> None:
    """Measure perplexity under each setting, next to the float model's on the same windows."""
    options = parse_options(option or ())
    gptq_options = parse_gptq_options(gptq or ())
    chosen = [parse_setting(name, options) for name in settings.split(",")]
    if calibration is None and any(setting.gptq is not None for setting in chosen):
        raise OptionError(name="calibration", value=None, reason="a setting with -gptq needs a text to calibrate on")

    import quarot_fx
    from quarot_fx.calibration.data import calibration_tokens
    from quarot_fx.cli.environment import describe_environment
    from quarot_fx.cli.models import compile_model, load_model
    from quarot_fx.cli.perplexity import measure
    from quarot_fx.text import fingerprint, read_text, split_windows

    content = read_text(text)
    network, tokenizer = load_model(model, device)
    if tokenizer is None:
        raise NotFoundError(kind="tokenizer", name=model, remedy="Perplexity needs the model's tokenizer files.")
    token_ids = split_windows(content, tokenizer, window_length, windows).to(device)
    calibration_ids = None
    if calibration is not None:
        seed = options.get("seed", 0)
        calibration_ids = calibration_tokens(calibration, tokenizer, samples, window_length, seed)

    record: dict[str, Any] = {
        "command": shlex.join(["quarot-fx", *sys.argv[1:]]),
        "model": model,
        "text": {"name": text, "sha256": fingerprint(content)},
        "windows": len(token_ids),
        "window_length": window_length,
        "calibration": calibration and {"text": calibration, "samples": samples},
        "nested_backend": nested_backend,
        **describe_environment(device),
        "results": [],
    }
    for setting in chosen:
        calibrated: dict[str, Any] = {}
        if setting.gptq is not None and calibration_ids is not None:
            how = quarot_fx.GPTQOptions.from_options({**gptq_options, **setting.gptq})
            report = quarot_fx.calibrate(network, calibration_ids, gptq=how, **(setting.options or {}))
            calibrated = {"gptq": asdict(how), "calibration_seconds": report.seconds}
        measurement = measure(compile_model(network, setting, nested_backend), token_ids, setting.name, batch)
        gc.collect()  # compiled graphs lie in reference cycles, and the next setting needs their memory
        result = {"setting": setting.name, "options": setting.options, **calibrated, **asdict(measurement)}
        record["results"].append(result)
        _add_ratios(record["results"])
        Console(stderr=True).print(f"{setting.name}: {measurement.perplexity:.6g}, {measurement.seconds:.0f} s")
        if json_file:
            _write(json_file, record)
    title = f"{model}: {text}, {len(token_ids)} windows of {window_length} tokens"
    Console().print(_table(record["results"], title))


def _add_ratios(results: list[dict[str, Any]]) -> None:
    float_perplexity = next((one["perplexity"] for one in results if one["options"] is None), None)
    for result in results:
        result["ratio"] = result["perplexity"] / float_perplexity if float_perplexity else None


def _write(file: Path, record: dict[str, Any]) -> None:
    """Replace a file as a whole: what was measured stays readable while the rest is measured."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(file)


def _table(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("setting", overflow="fold")
    for column in ("perplexity", "ratio to float", "seconds", "of it first batch"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        ratio = "" if result["ratio"] is None else f"{result['ratio']:.5g}"
        seconds = (f"{result['seconds']:.1f}", f"{result['first_seconds']:.1f}")
        table.add_row(result["setting"], f"{result['perplexity']:.6g}", ratio, *seconds)
    return table
