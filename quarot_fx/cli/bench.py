"""``quarot-fx bench``: how fast the kernels, decoder layers and models are on this GPU."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from quarot_fx.cli.settings import OptionAssignments, parse_options
from quarot_fx.errors import NoGPUError, OptionError, UnknownOptionError

if TYPE_CHECKING:
    from quarot_fx.bench.models import Compile, Workload
    from quarot_fx.bench.record import Record
    from quarot_fx.bench.shapes import DecoderShape

TUNED = ("matmul", "attention")
CACHE_BITS = 4  # of the largest cache that is looked for
FUSED_ROWS = (1, 16, 2048, 16384)
T = TypeVar("T")
Rows = Iterator[tuple[str, Any]]  # with the name of the list in the record that each belongs to


@dataclass(frozen=True)
class Choice:
    """What the command line picks of everything that could be measured; ``None`` leaves it to the part."""

    tokens: list[int] | None
    shapes: list[tuple[int, int]] | None
    peers: list[str] | None
    models: list[str] | None
    phases: list[str] | None
    sequences: list[int] | None
    cache_bits: list[int] | None
    options: dict[str, Any]


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of matmul, fused, attention, hadamard, gated, layers, models, memory, calibration; all if none."
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers separated by commas, instead of those of a part.")] = None,
    shapes: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS, separated by commas, of weights.")] = None,
    peers: Annotated[
        str | None, typer.Option(help="Other libraries to measure with matmul, separated by commas; '' for none.")
    ] = None,
    models: Annotated[str | None, typer.Option(help="Whose shape decoders have, separated by commas.")] = None,
    phases: Annotated[str | None, typer.Option(help="Of layers and models: prefill, decode or both.")] = None,
    sequences: Annotated[str | None, typer.Option(help="Of decoders: how many run together, or GPTQ is given.")] = None,
    cache_bits: Annotated[
        str | None, typer.Option(help="Of the cache in decode, separated by commas; 16 is an ordinary one.")
    ] = None,
    option: OptionAssignments = None,
    tune: Annotated[Path | None, typer.Option(help="Search for launch parameters, and write them here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, one by one.")] = None,
    from_file: Annotated[Path | None, typer.Option("--from", help="Show what --json wrote; needs no GPU.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the numbers into this .svg or .png.")] = None,
) -> None:
    """Measure kernels, decoder layers and whole models against bfloat16, on one GPU."""
    from quarot_fx.bench.record import Record
    from quarot_fx.bench.tables import tables

    choice = Choice(
        tokens=_list(tokens, partial(_parse_count, "tokens")),
        shapes=_list(shapes, _parse_shape),
        peers=_list(peers, str),
        models=_list(models, str),
        phases=_list(phases, str),
        sequences=_list(sequences, partial(_parse_count, "sequences")),
        cache_bits=_list(cache_bits, partial(_parse_count, "cache_bits")),
        options=parse_options(option),
    )
    for part in parts or ():
        if part not in PARTS:
            raise UnknownOptionError("part", part, PARTS)
    if tune:
        _refuse(json_file, from_file, plot_file, name="tune", value=tune)
        tune.write_text(_tuned(choice, parts or TUNED), encoding="utf-8")
        return
    plot = _plotter(plot_file)
    if from_file:
        _refuse(parts, json_file, name="from", value=from_file)
        record = Record.read(from_file)
    else:
        record = _measure(parts or list(PARTS), choice, json_file)
    console = Console()
    for table in tables(record):
        console.print(table)
    plot(record)


def _measure(parts: Sequence[str], choice: Choice, json_file: Path | None) -> Record:
    """Measure parts, writing every row as soon as it is there: a run may be cut short."""
    from quarot_fx.bench.peers import PACKAGES
    from quarot_fx.bench.record import Record
    from quarot_fx.cli.environment import describe_environment

    planned = [(part, PARTS[part](choice)) for part in parts]
    _check_gpu()
    environment = describe_environment("cuda", others=PACKAGES.values())
    record = Record({"command": shlex.join(["quarot-fx", *sys.argv[1:]]), **environment})
    with Console(stderr=True).status("") as status:
        for part, rows in planned:
            status.update(part)
            for name, row in rows:
                getattr(record, name).append(row)
                status.update(Text(f"{part}: {row}"))
                if json_file:
                    record.write(json_file)
    return record


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise NoGPUError


# -- parts -----------------------------------------------------------------------------------------


def _matmul(choice: Choice) -> Rows:
    from quarot_fx.bench.peers import PACKAGES, check_peers
    from quarot_fx.bench.shapes import TOKENS, distinct_shapes

    peers = list(PACKAGES) if choice.peers is None else choice.peers
    check_peers(peers)

    def rows() -> Rows:
        from quarot_fx.bench.matmul import measure_matmuls
        from quarot_fx.bench.peers import measure_peers

        for shape in choice.shapes or distinct_shapes():
            products = list(measure_matmuls([shape], choice.tokens or TOKENS))
            yield from (("matmul", product) for product in products)
            yield from (("peers", time) for time in measure_peers(peers, products))

    return rows()


def _fused(choice: Choice) -> Rows:
    from quarot_fx.bench.fused import WIDTHS, measure_fused

    yield from (("fused", time) for time in measure_fused(WIDTHS, choice.tokens or FUSED_ROWS))


def _attention(choice: Choice) -> Rows:
    from quarot_fx.bench.attention import CACHES, SEQUENCES, measure_attention

    caches = list(itertools.product(SEQUENCES, choice.tokens)) if choice.tokens else CACHES
    yield from (("attention", time) for time in measure_attention(caches))


def _hadamard(choice: Choice) -> Rows:
    from quarot_fx.bench.hadamard import SHAPES, TOKENS, measure_hadamards

    times = measure_hadamards(choice.shapes or SHAPES, choice.tokens or TOKENS)
    yield from (("hadamard", time) for time in times)


def _gated(choice: Choice) -> Rows:
    from quarot_fx.bench.gated import SHAPES, TOKENS, measure_gated

    times = measure_gated(choice.shapes or SHAPES, choice.tokens or TOKENS)
    yield from (("gated", time) for time in times)


def _layers(choice: Choice) -> Rows:
    from quarot_fx.bench.models import measure_layers

    return _decoders("layers", measure_layers, choice)


def _models(choice: Choice) -> Rows:
    from quarot_fx.bench.models import measure_models

    return _decoders("models", measure_models, choice)


def _memory(choice: Choice) -> Rows:
    from quarot_fx.bench.capacity import SEQUENCES, measure_capacity, ways

    shapes = _decoder_shapes(choice)

    def rows() -> Rows:
        for (name, shape), bits in itertools.product(shapes.items(), choice.cache_bits or (CACHE_BITS,)):
            for way, sequences in itertools.product(ways(choice.options, bits), choice.sequences or (SEQUENCES,)):
                yield from (("memory", use) for use in measure_capacity(name, shape, way, sequences, "cuda"))

    return rows()


def _calibration(choice: Choice) -> Rows:
    from quarot_fx.bench.calibration import SAMPLES, TOKENS, measure_calibration

    shapes = _decoder_shapes(choice)

    def rows() -> Rows:
        sizes = itertools.product(choice.sequences or (SAMPLES,), choice.tokens or (TOKENS,))
        for (name, shape), (samples, tokens) in itertools.product(shapes.items(), sizes):
            times = measure_calibration(name, shape, samples, tokens, choice.options, "cuda")
            yield from (("calibration", time) for time in times)

    return rows()


def _decoders(
    name: str,
    measure: Callable[[dict[str, DecoderShape], dict[str, Compile], Workload], Iterator[Any]],
    choice: Choice,
) -> Rows:
    from quarot_fx.bench.models import BFLOAT16, PHASES, TOKENS, Workload, compilers

    phases = choice.phases or PHASES
    for phase in phases:
        if phase not in PHASES:
            raise UnknownOptionError("phase", phase, PHASES)
    shapes = _decoder_shapes(choice)
    compile_by = compilers(choice.options)

    def rows() -> Rows:
        for sequences, tokens in itertools.product(choice.sequences or (1,), choice.tokens or (TOKENS,)):
            for bits in choice.cache_bits or (BFLOAT16,):
                workload = Workload(tokens, sequences, bits, tuple(phases))
                # Only what quarot compiles makes use of codes: other backends would decode all of them at each step.
                chosen = compile_by if bits == BFLOAT16 else {"quarot": compile_by["quarot"]}
                yield from ((name, time) for time in measure(shapes, chosen, workload))

    return rows()


def _decoder_shapes(choice: Choice) -> dict[str, DecoderShape]:
    from quarot_fx.bench.shapes import MODELS
    from quarot_fx.extras import import_extra

    import_extra("transformers", extra="models")
    for model in choice.models or ():
        if model not in MODELS:
            raise UnknownOptionError("model", model, MODELS)
    return {model: MODELS[model] for model in choice.models or MODELS}


PARTS: dict[str, Callable[[Choice], Rows]] = {
    "matmul": _matmul,
    "fused": _fused,
    "attention": _attention,
    "hadamard": _hadamard,
    "gated": _gated,
    "layers": _layers,
    "models": _models,
    "memory": _memory,
    "calibration": _calibration,
}


# -- what the command line says --------------------------------------------------------------------


def _refuse(*others: object, name: str, value: Path) -> None:
    """Raise :class:`OptionError` if an option that leaves nothing to measure comes with what is about measuring."""
    if any(others):
        reason = "measures nothing: name no parts and no other file with it, but --plot with --from"
        raise OptionError(name=name, value=str(value), reason=reason)


def _list(text: str | None, parse: Callable[[str], T]) -> list[T] | None:
    """Return what a text names, separated by commas; ``None`` where there is none."""
    return None if text is None else [parse(item.strip()) for item in text.split(",") if item.strip()]


def _parse_count(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise OptionError(name=name, value=text, reason="is not a number, 1 or more")
    return int(text)


def _parse_shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise OptionError(name="shapes", value=text, reason="is not ROWSxCOLUMNS, such as 4096x4096") from None
    return rows, columns


def _plotter(path: Path | None) -> Callable[[Record], None]:
    """Return what draws a record; made before anything is measured, since matplotlib may be missing."""
    if path is None:
        return lambda record: None
    from quarot_fx.extras import import_extra

    import_extra("matplotlib", extra="bench")
    from quarot_fx.bench.plot import plot

    return lambda record: plot(record, path)


# -- tuning ----------------------------------------------------------------------------------------


def _tuned(choice: Choice, parts: Sequence[str]) -> str:
    """Search, and return a table of launch parameters, one entry a line, for GPUs with this one's memory or more."""
    import torch

    from quarot_fx.bench.shapes import distinct_shapes
    from quarot_fx.bench.tune import TOKENS, tune_attention, tune_matmul
    from quarot_fx.lowering.triton.device import describe

    for part in parts:
        if part not in TUNED:
            raise OptionError(name="tune", value=part, reason=f"launch parameters are searched for {', '.join(TUNED)}")
    _check_gpu()
    table: dict[str, list[dict[str, Any]]] = {}
    if "matmul" in parts:
        table |= tune_matmul(choice.shapes or list(distinct_shapes()), choice.tokens or TOKENS)
    if "attention" in parts:
        table |= tune_attention()
    shared = describe(torch.device("cuda")).shared_bytes
    kernels = (
        f'  "{kernel}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for kernel, entries in sorted(table.items())
    )
    return f'{{\n  "shared_bytes": {shared},\n' + ",\n".join(kernels) + "\n}\n"
