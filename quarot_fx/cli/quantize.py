"""``quarot-fx quantize``: a model as a checkpoint in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from quarot_fx.cli.settings import OptionAssignments, parse_options, parse_setting
from quarot_fx.errors import OptionError


def quantize(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    setting: Annotated[str, typer.Option(help="Such as W4A4KV4, W8A8KV8, KV4 or rotated.")] = "W4A4KV4",
    option: OptionAssignments = None,
    calibration: CalibrationText = None,
    samples: CalibrationSamples = 128,
    learning_samples: LearningSamples = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a calibration window.")] = 2048,
    gptq: GPTQAssignments = None,
    learning: LearningAssignments = None,
    tuning: TuningAssignments = None,
    calibration_state: Annotated[
        Path | None, typer.Option(help="A folder that calibration is saved in step by step, and resumed from.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is not quantised: float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where weights are quantised.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Of a file.")] = "2GB",
) -> None:
    """Quantise a model, and write what `quarot_fx.load` and `from_pretrained` read, with its tokenizer."""
    chosen = parse_setting(setting, parse_options(option))
    methods = parse_methods(gptq, learning, tuning)
    if chosen.options is None:
        raise OptionError(name="setting", value=setting, reason="rewrites nothing; did you mean 'rotated'?")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise OptionError(name="dtype", value=dtype, reason="must be float32, bfloat16 or float16")

    check_calibration_text(calibration, chosen)

    import torch

    import quarot_fx
    from quarot_fx.cli.models import load_model
    from quarot_fx.cli.preparation import CalibrationWindows, prepare

    network, tokenizer = load_model(model, device)
    network = network.to(getattr(torch, dtype))
    if calibration is not None and chosen.needs_calibration:
        counts, seed = (samples, learning_samples or samples), chosen.options.get("seed", 0)
        calibrated_on = CalibrationWindows.of_text(calibration, tokenizer, *counts, length, seed, *methods)
        prepared = prepare(network, chosen, calibrated_on, calibration_state)
        chosen = prepared.setting
        for report in (prepared.learned, prepared.calibration, prepared.tuned):
            if report is not None:
                Console().print(report)
    quarot_fx.save(network, folder, free_originals=True, max_shard_size=max_shard_size, **(chosen.options or {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    Console().print(f"{folder}: {size / 2**20:,.1f} MiB")
