"""``quarot-fx plot``: what a rotation does to activations, and what quantisation then does to each layer."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quarot_fx.cli.settings import OptionAssignments, parse_options, parse_setting
from quarot_fx.errors import NotFoundError, OptionError

FORMATS = ("png", "svg", "pdf")


def plot(
    model: Annotated[str, typer.Argument(help="A GGUF file, a folder, a name on the hub, or 'smollm2'.")],
    folder: Annotated[Path, typer.Argument(help="Figures, and their numbers as JSON, are written here.")],
    text: Annotated[str, typer.Option(help="A text file, 'wikitext2', 'c4', 'ptb' or 'pydoc'.")] = "pydoc",
    tokens: Annotated[int, typer.Option(min=2, help="Of the text, from its beginning.")] = 512,
    setting: Annotated[str, typer.Option(help="Such as W4A4KV4, W8A8KV8 or KV4.")] = "W4A4KV4",
    option: OptionAssignments = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    image: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
) -> None:
    """Draw ranges of activations per channel, and signal to quantisation noise per layer, with and without rotation."""
    options = parse_setting(setting, parse_options(option)).options
    if options is None or options.get("rotation") == "none":
        raise OptionError(name="setting", value=setting, reason="is drawn with and without rotation: name one with it")
    if image not in FORMATS:
        raise OptionError(name="format", value=image, reason=f"is not one of {', '.join(FORMATS)}")

    from quarot_fx.cli.environment import describe_environment
    from quarot_fx.cli.models import load_model
    from quarot_fx.config import QuarotConfig
    from quarot_fx.extras import import_extra
    from quarot_fx.inspection import bound_program
    from quarot_fx.quantization_error import measure_sqnr
    from quarot_fx.text import fingerprint, read_text, split_windows

    import_extra("matplotlib", extra="eval")
    from quarot_fx.cli.figures import draw_ranges, draw_sqnr, inputs_to_draw

    content = read_text(text)
    network, tokenizer = load_model(model, device)
    if tokenizer is None:
        raise NotFoundError(kind="tokenizer", name=model, remedy="A text needs the model's tokenizer files.")
    token_ids = split_windows(content, tokenizer, tokens, 1).to(device)
    config = QuarotConfig.from_options(options)
    with Console(stderr=True).status("capturing"):
        program, arguments = bound_program(network, {"input_ids": token_ids, "use_cache": False}, needs_data=True)
    with Console(stderr=True).status("with rotation"):
        rotated = measure_sqnr(program, arguments, config)
    with Console(stderr=True).status("without rotation"):
        unrotated = measure_sqnr(program, arguments, replace(config, rotation="none"))

    folder.mkdir(parents=True, exist_ok=True)
    inputs = inputs_to_draw(rotated, unrotated)
    title = f"{model}, {tokens} tokens of {text}"
    draw_ranges(inputs, title, folder / f"ranges.{image}")
    draw_sqnr(rotated, unrotated, f"{title}, {setting}", folder / f"sqnr.{image}")
    record = {
        "command": shlex.join(["quarot-fx", *sys.argv[1:]]),
        "model": model,
        "text": {"name": text, "sha256": fingerprint(content)},
        "tokens": tokens,
        "setting": setting,
        "options": options,
        **describe_environment(device, others=("matplotlib",)),
        "rotated": rotated.as_dict(),
        "unrotated": unrotated.as_dict(),
        "ranges": [one.as_dict() for one in inputs],
    }
    (folder / "layers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(rotated)
    console.print(f"wrote ranges.{image}, sqnr.{image} and layers.json into {folder}", soft_wrap=True)
