"""``quarot-fx learn``: rotations for a model, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quarot_fx.cli.calibration import LearningAssignments
from quarot_fx.cli.settings import OptionAssignments, parse_options, parse_setting
from quarot_fx.errors import NotFoundError, OptionError
from quarot_fx.learning.options import LearningOptions


def learn(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    folder: Annotated[Path, typer.Argument(help="Where the rotations go.")],
    calibration: Annotated[str, typer.Option(help="What they are learned on: a text file, 'wikitext2', 'c4', ...")],
    samples: Annotated[int, typer.Option(min=1, help="Windows that are drawn from it.")] = 128,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    setting: Annotated[str, typer.Option(help="That they are for: W4A4KV4, W4A8KV4, ...")] = "W4A4KV4",
    option: OptionAssignments = None,
    learning: LearningAssignments = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Learn the rotations that a model's weights absorb, for `-o learned_rotations=FOLDER` of the other commands."""
    options, how = parse_setting(setting, parse_options(option)).options, parse_options(learning, LearningOptions)
    if options is None:
        raise OptionError(name="setting", value=setting, reason="quantises nothing; did you mean 'W4A4KV4'?")

    import quarot_fx
    from quarot_fx.cli.models import load_model

    network, tokenizer = load_model(model, device)
    if tokenizer is None:
        raise NotFoundError(kind="tokenizer", name=model, remedy="A text needs the model's tokenizer files.")
    learned = quarot_fx.learn_rotations(
        network, calibration, tokenizer=tokenizer, samples=samples, length=window_length, learning=how, **options
    )
    learned.save(folder)
    Console().print(learned)
