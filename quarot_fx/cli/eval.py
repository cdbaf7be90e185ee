"""``quarot-fx eval``: perplexity and zero-shot tasks of the compiled model itself, setting by setting."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quarot_fx.cli.calibration import (
    CalibrationSamples,
    CalibrationText,
    GPTQAssignments,
    LearningAssignments,
    TuningAssignments,
    check_calibration_text,
)
from quarot_fx.cli.settings import (
    DEFAULT_SETTINGS,
    OptionAssignments,
    Setting,
    parse_gptq_options,
    parse_learning_options,
    parse_options,
    parse_setting,
    parse_tuning_options,
    split_settings,
)
from quarot_fx.errors import NotFoundError, OptionError, QuarotError


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
    options = parse_options(option or ())
    gptq_options, learning_options = parse_gptq_options(gptq or ()), parse_learning_options(learning or ())
    tuning_options = parse_tuning_options(tuning or ())
    chosen = _settings(settings, settings_file, options)
    if tasks is None and (include_path is not None or limit is not None):
        raise OptionError(name="tasks", value=None, reason="--include-path and --limit are about tasks: name some")
    if text is None and (tasks is None or needles is not None):
        text = "pydoc"
    if chunk is not None and text is None:
        raise OptionError(name="chunk", value=chunk, reason="is about a text: name one")
    for setting in chosen:
        check_calibration_text(calibration, setting)

    from quarot_fx.calibration.data import calibration_tokens
    from quarot_fx.cli.chunks import InChunks, cache_options
    from quarot_fx.cli.environment import describe_environment
    from quarot_fx.cli.models import compile_model, load_model
    from quarot_fx.cli.needles import Needles, parse_lengths
    from quarot_fx.cli.perplexity import measure
    from quarot_fx.cli.preparation import prepare
    from quarot_fx.cli.results import Results
    from quarot_fx.cli.tasks import Tasks
    from quarot_fx.cli.windows import TextWindows
    from quarot_fx.text import fingerprint, most_windows, read_text, split_windows

    content = "" if text is None else read_text(text)
    harness = None if tasks is None else Tasks.find(tasks.split(","), include_path, limit, batch_size)
    network, tokenizer = load_model(model, device)
    if tokenizer is None:
        raise NotFoundError(kind="tokenizer", name=model, remedy="Evaluation needs the model's tokenizer files.")
    of_text, hidden = None, None
    if text is not None and needles is not None:
        haystack = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0].to(device)
        hidden = Needles(text, fingerprint(content), haystack, tokenizer, parse_lengths(needles), depths)
    elif text is not None:
        token_ids = split_windows(content, tokenizer, window_length, windows or most_windows(text)).to(device)
        of_text = TextWindows(text, fingerprint(content), token_ids)

    calibration_ids = None
    if calibration is not None:
        calibration_ids = calibration_tokens(calibration, tokenizer, samples, window_length, options.get("seed", 0))

    measured = [one for one in (of_text, hidden, harness) if one is not None]
    about: dict[str, Any] = {"command": shlex.join(["quarot-fx", *sys.argv[1:]]), "model": model}
    for one in measured:
        about |= one.about
    if calibration is not None:
        about["calibration"] = {"text": calibration, "samples": samples}
    packages = () if harness is None else ("lm-eval", "datasets")
    about |= {"nested_backend": nested_backend, **describe_environment(device, others=packages)}
    results = Results(f"{model}: {'; '.join(one.title for one in measured)}", about)
    for chosen_setting in chosen:
        setting = chosen_setting
        row: dict[str, Any] = {"setting": setting.name, "options": setting.options}
        try:
            if setting.needs_calibration and calibration_ids is not None:
                prepared = prepare(network, setting, calibration_ids, gptq_options, learning_options, tuning_options)
                setting = prepared.setting
                row |= prepared.results()
            runnable = compile_model(network, setting, nested_backend)
            reader = runnable
            if chunk is not None:
                room = window_length if hidden is None else hidden.longest
                reader = InChunks(runnable, network, cache_options(setting.options), chunk, room)
            if of_text is not None:
                row |= asdict(measure(reader, of_text.token_ids, setting.name, batch))
            if hidden is not None:
                row |= hidden.measure(reader, setting.name)
            if chunk is not None:
                row["cache"] = reader.about
            if harness is not None:
                row |= harness.measure(runnable, network, tokenizer)
        except QuarotError as error:
            if setting.options is None:  # it is not the setting that is at fault
                raise
            row["reason"] = str(error)
        results.add(row)
        Console(stderr=True).print(results.latest(), markup=False, soft_wrap=True)
        if json_file:  # now already: a long run may be cut short
            results.write(json_file)
        runnable = None
        gc.collect()  # compiled graphs lie in reference cycles, and the next setting needs their memory
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
