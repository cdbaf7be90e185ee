"""``quarot-fx eval``: perplexity and zero-shot tasks of the compiled model itself, setting by setting."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quarot_fx.cli.calibration import (
    CalibrationSamples,
    CalibrationText,
    GPTQAssignments,
    LearningAssignments,
    LearningSamples,
    TuningAssignments,
    check_calibration_text,
    parse_methods,
)
from quarot_fx.cli.settings import (
    DEFAULT_SETTINGS,
    OptionAssignments,
    Setting,
    parse_options,
    parse_setting,
    split_settings,
)
from quarot_fx.errors import NotFoundError, OptionError

if TYPE_CHECKING:
    from quarot_fx.cli.results import Results

DEFAULT_TEXT = "pydoc"


def evaluate(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    text: Annotated[
        str | None,
        typer.Option(help="For perplexity: a text file, 'wikitext2', 'c4', 'ptb', or 'pydoc', if there are no tasks."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first N windows.")] = None,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Windows that the model gets at a time.")] = 1,
    needles: Annotated[
        str | None, typer.Option(help="Instead of perplexity: hide words in 2048,8192 tokens, and ask for them.")
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Needles in texts of each length.")] = 5,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Give texts so many tokens at a time, through a KV cache of few bits.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas: piqa,arc_easy.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of tasks in lm-eval's format.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions of a task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch of a task.")] = 8,
    settings: Annotated[
        str | None, typer.Option(help=f"Names separated by commas; {','.join(DEFAULT_SETTINGS)} if not given.")
    ] = None,
    settings_file: Annotated[
        Path | None, typer.Option(help="A .json or .toml file of settings instead, each with options of its own.")
    ] = None,
    option: OptionAssignments = None,
    calibration: CalibrationText = None,
    samples: CalibrationSamples = 128,
    learning_samples: LearningSamples = None,
    gptq: GPTQAssignments = None,
    learning: LearningAssignments = None,
    tuning: TuningAssignments = None,
    nested_backend: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "eager",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers here, after every setting.")
    ] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the table here.")] = None,
) -> None:
    """Measure perplexity, needles in a text, and zero-shot tasks under each setting, next to the float model's."""
    options = parse_options(option)
    methods = parse_methods(gptq, learning, tuning)
    chosen = _settings(settings, settings_file, options)
    if text is None and (tasks is None or needles is not None):
        text = DEFAULT_TEXT
    _check_options_go_together(text, chunk, tasks, include_path, limit)
    for setting in chosen:
        check_calibration_text(calibration, setting)

    from quarot_fx.cli.environment import describe_environment
    from quarot_fx.cli.evaluation import Evaluation
    from quarot_fx.cli.models import load_model
    from quarot_fx.cli.needles import Needles
    from quarot_fx.cli.preparation import CalibrationWindows
    from quarot_fx.cli.results import Results
    from quarot_fx.cli.tasks import Tasks
    from quarot_fx.cli.windows import TextWindows
    from quarot_fx.text import read_text

    content = "" if text is None else read_text(text)
    asked = None if tasks is None else Tasks.find(tasks.split(","), include_path, limit, batch_size)
    network, tokenizer = load_model(model, device)
    if tokenizer is None:
        raise NotFoundError(kind="tokenizer", name=model, remedy="Evaluation needs the model's tokenizer files.")
    read: TextWindows | Needles | None = None
    if text is not None and needles is not None:
        read = Needles.of_text(text, content, tokenizer, needles, depths, device)
    elif text is not None:
        read = TextWindows.of_text(text, content, tokenizer, window_length, windows, batch, device)
    calibrated_on = None
    if calibration is not None:
        counts, seed = (samples, learning_samples or samples), options.get("seed", 0)
        calibrated_on = CalibrationWindows.of_text(calibration, tokenizer, *counts, window_length, seed, *methods)
    evaluation = Evaluation(network, tokenizer, read, asked, chunk, calibrated_on, nested_backend)

    about = {"command": shlex.join(["quarot-fx", *sys.argv[1:]]), "model": model, **evaluation.about}
    packages = () if asked is None else ("lm-eval", "datasets")
    about |= describe_environment(device, others=packages)
    results = Results(f"{model}: {evaluation.title}", about)
    for setting in chosen:
        results.add(evaluation.row(setting))
        Console(stderr=True).print(results.latest(), markup=False, soft_wrap=True)
        if json_file:  # now already: a long run may be cut short
            results.write(json_file)
        gc.collect()  # compiled graphs lie in reference cycles, and the next setting needs their memory
    _show(results, markdown_file)


def _check_options_go_together(
    text: str | None, chunk: int | None, tasks: str | None, include_path: Path | None, limit: int | None
) -> None:
    if tasks is None and (include_path is not None or limit is not None):
        raise OptionError(name="tasks", value=None, reason="--include-path and --limit are about tasks: name some")
    if chunk is not None and text is None:
        raise OptionError(name="chunk", value=chunk, reason="is about a text: name one")


def _show(results: Results, markdown_file: Path | None) -> None:
    """Print the table, and write it; end with status 1 if a setting gave no number."""
    console = Console()
    console.print(results.table())
    if markdown_file:
        markdown_file.write_text(results.markdown(), encoding="utf-8")
    for reason in results.reasons():
        console.print(reason, style="red", markup=False, soft_wrap=True)
    if any(results.reasons()):
        raise typer.Exit(1)


def _settings(names: str | None, file: Path | None, options: Mapping[str, Any]) -> list[Setting]:
    """Return the settings that the command line or a file names; the usual ones if neither does."""
    if file is None:
        return [parse_setting(name, options) for name in (DEFAULT_SETTINGS if names is None else split_settings(names))]
    if names is not None:
        raise OptionError(name="settings-file", value=str(file), reason="comes instead of --settings")
    from quarot_fx.cli.settings_file import read_settings

    return read_settings(file, options)
