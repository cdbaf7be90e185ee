"""``quarot-fx bench``: how fast the kernels are on this GPU."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quarot_fx.errors import NoGPUError, OptionError

if TYPE_CHECKING:
    from quarot_fx.bench.fused import FusedTime
    from quarot_fx.bench.matmul import MatmulTime

PARTS = ("matmul", "fused")


def bench(
    parts: Annotated[str, typer.Option(help="Names separated by commas: matmul, fused.")] = ",".join(PARTS),
    tokens: Annotated[str | None, typer.Option(help="Numbers separated by commas, instead of 1 to 16384.")] = None,
    shapes: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS, separated by commas, of weights.")] = None,
    tune: Annotated[Path | None, typer.Option(help="Search for launch parameters, and write them here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Measure integer matrix products against bfloat16, and fused quantisation against a copy, on one GPU."""
    import torch

    from quarot_fx.bench.shapes import TOKENS, distinct_shapes
    from quarot_fx.cli.environment import describe_environment

    if not torch.cuda.is_available():
        raise NoGPUError
    asked = parts.split(",")
    if unknown := set(asked) - set(PARTS):
        raise OptionError(name="parts", value=parts, reason=f"{', '.join(unknown)}: known are {', '.join(PARTS)}")
    counts = tuple(map(int, tokens.split(","))) if tokens else TOKENS
    weights = [_parse_shape(shape) for shape in shapes.split(",")] if shapes else list(distinct_shapes())

    if tune:
        from quarot_fx.bench import tune as search

        table = search.tune(weights, counts if tokens else search.TOKENS)
        tune.write_text(_table_text(table), encoding="utf-8")
        return

    record: dict[str, Any] = {"command": shlex.join(["quarot-fx", *sys.argv[1:]]), **describe_environment("cuda")}
    console = Console()
    if "matmul" in asked:
        from quarot_fx.bench.matmul import measure_matmuls

        matmuls = list(measure_matmuls(weights, counts))
        console.print(_matmul_table(matmuls))
        record["matmul"] = [{**asdict(time), "speedup": time.speedup} for time in matmuls]
    if "fused" in asked:
        from quarot_fx.bench.fused import WIDTHS, measure_fused

        fused = list(measure_fused(WIDTHS, [count for count in counts if count in (1, 16, 2048, 16384)]))
        console.print(_fused_table(fused))
        record["fused"] = [asdict(time) for time in fused]
    if json_file:
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _parse_shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise OptionError(name="shapes", value=text, reason="is not ROWSxCOLUMNS, such as 4096x4096") from None
    return rows, columns


def _matmul_table(times: Sequence[MatmulTime]) -> Table:
    table = Table(title="W4A4 product with quantisation of its input, against cuBLAS in bfloat16")
    for column in (
        "rows x columns",
        "tokens",
        "bfloat16 µs",
        "quantise µs",
        "product µs",
        "both µs",
        "TOP/s",
        "speed-up",
    ):
        table.add_column(column, justify="right")
    for t in times:
        numbers = (f"{value:.1f}" for value in (t.bfloat16, t.quantize, t.matmul, t.total))
        shape = f"{t.rows} x {t.columns}"
        table.add_row(shape, str(t.tokens), *numbers, f"{t.tera_operations:.0f}", f"{t.speedup:.2f}x")
    return table


def _fused_table(times: Sequence[FusedTime]) -> Table:
    table = Table(title="bfloat16 to codes, by the bytes that must be moved")
    table.add_column("kernel", no_wrap=True)
    for column in ("rows", "width", "µs", "GB/s", "of a copy"):
        table.add_column(column, justify="right")
    for t in times:
        numbers = (f"{t.microseconds:.1f}", f"{t.gigabytes_per_second:.0f}", f"{t.of_copy:.0%}")
        table.add_row(t.kernel, str(t.rows), str(t.width), *numbers)
    return table


def _table_text(table: dict[str, list[dict[str, Any]]]) -> str:
    """Write a table of launch parameters one entry a line, for GPUs with this one's shared memory or more."""
    import torch

    from quarot_fx.lowering.triton.device import describe

    shared = describe(torch.device("cuda")).shared_bytes
    kernels = (
        f'  "{kernel}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for kernel, entries in sorted(table.items())
    )
    return f'{{\n  "shared_bytes": {shared},\n' + ",\n".join(kernels) + "\n}\n"
