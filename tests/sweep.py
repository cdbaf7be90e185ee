"""Every decoder that transformers registers, through the backend: is it right, and how much of it is in 4 bits?

    python tests/sweep.py                        # all of them; writes docs/architectures.md and its data
    python tests/sweep.py llama mixtral --dry    # only these, and only to the terminal

Exits with status 1 if any architecture breaks a limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tiny_decoders import TinyDecoder, build, first_logits, model_types

from quarot_fx.backend import quarot
from quarot_fx.capture import INPUT
from quarot_fx.cli.environment import describe_environment
from quarot_fx.config import QuarotConfig
from quarot_fx.coverage import cover
from quarot_fx.float64 import relative_difference, run_in_float64
from quarot_fx.inspection import capture_graphs
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fold_constants import FoldConstants
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.passes.rotate import Rotate
from quarot_fx.report import Report
from quarot_fx.store import WeightStore

CATEGORIES = ("decoder", "hybrid", "encoder-derived")
DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "architectures.json"
# Largest relative difference of the output. Only the first is a statement about the passes alone: eager models cast
# norms and RoPE to float32 in every dtype.
LIMITS = {
    "graph": 1e-9,  # captured against rotated graph, all casts promoted to float64
    "float64": 1e-5,  # eager against compiled model
    "float32": 1e-4,
    "reference": 1e-3,  # 4 bits through AOTAutograd against the references run eagerly
}


@dataclass
class Record:
    """What became of one architecture.

    Attributes:
        name, category: of the architecture.
        graphs: graphs with parameters that Dynamo makes of it.
        differences: by the names of ``LIMITS``; None where the model itself does not run.
        four_bits: relative difference of the 4-bit logits from those in float32.
        coverage: sums over all graphs of the fields of :class:`~quarot_fx.report.Coverage`.
        layers: decoder layers.
        declined: ``"pass: reason"`` -> number of times.
        others: matrices that stay as they are, and what reads them.
        unread: matrices that no graph reads as parameters: code between the graphs slices them.
        planning: seconds for capture and all passes up to the rotation plan.
        error: what went wrong, if anything did.
        seconds: how long all of this took.
    """

    name: str
    category: str
    graphs: int = 0
    differences: dict[str, float | None] = field(default_factory=dict)
    four_bits: float | None = None
    coverage: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    declined: dict[str, int] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    planning: float = 0.0
    error: str = ""
    seconds: float = 0.0

    def failures(self) -> list[str]:
        """The limits that it breaks."""
        if self.error:
            return [self.error]
        found = [f"{name} {d:.1e}" for name, d in self.differences.items() if d is not None and not d < LIMITS[name]]
        return found if self.four_bits is not None else [*found, "4-bit logits are not finite"]


def measure(name: str, category: str) -> Record:
    """Try one architecture in all ways."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    record, start = Record(name, category), time.perf_counter()
    try:
        tiny = build(name)
        record.layers = tiny.layers
        _plan(tiny, record)
        _compile(tiny, record)
    except Exception as error:
        record.error = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    record.seconds = round(time.perf_counter() - start, 1)
    return record


def _plan(tiny: TinyDecoder, record: Record) -> None:
    """Run the passes on every graph."""
    declined, coverage, differences = Counter[str](), Counter[str](), [0.0]
    read: set[int] = set()
    start = time.perf_counter()
    graphs = capture_graphs(tiny.model, tiny.inputs)
    programs = [captured.bind(arguments, WeightStore()) for captured, arguments in graphs]
    planned = [run_pipeline(program, _passes_until("place-rotations")) for program in programs]
    record.planning = round(time.perf_counter() - start, 2)
    record.graphs = len(graphs)
    for (captured, arguments), program, plan in zip(graphs, programs, planned, strict=True):
        read.update(id(arguments[place]) for place in captured.parameters)
        inputs = [arguments[node.meta[INPUT]] for node in program.graph.find_nodes(op="placeholder")]
        rotated = Rotate()(plan)
        results = (run_in_float64(p.graph_module, *inputs) for p in (rotated, program))
        differences.append(relative_difference(*results))
        report = cover(run_pipeline(program, build_pipeline(QuarotConfig())))
        coverage.update(asdict(report.coverage))
        declined.update(_declined(report))
        record.others.update({_of_any_layer(other.parameter): other.read_by for other in report.others})
    weights = {name: p for name, p in tiny.model.named_parameters() if p.ndim >= 2}
    record.unread = sorted({_of_any_layer(name) for name, p in weights.items() if id(p) not in read})
    record.differences["graph"] = max(differences)
    record.coverage, record.declined = dict(coverage), dict(declined)


def _passes_until(last: str) -> list[Pass]:
    """Passes that compute no constant: exactness is a matter of the graph, not of how weights are rounded."""
    return [one for one in build_pipeline(QuarotConfig(stop_after=last)) if not isinstance(one, FoldConstants)]


def _declined(report: Report) -> Counter[str]:
    return Counter(f"{one.name}: {_of_any_layer(d.reason)}" for one in report.passes for d in one.declined)


def _of_any_layer(text: str) -> str:
    return re.sub(r"(?<=\w)_\d+\b", "", re.sub(r"(?<=\.)\d+\b", "*", text))


def _compile(tiny: TinyDecoder, record: Record) -> None:
    """Run the compiled model next to the eager one."""
    expected = _run(tiny.model, tiny.inputs)
    results = _run_compiled(tiny)
    record.differences["float32"] = relative_difference([results["rotated"]], [expected])
    is_finite = bool(results["4 bits"].isfinite().all())
    record.four_bits = relative_difference([results["4 bits"]], [expected]) if is_finite else None

    record.differences["float64"] = None
    tiny.model.double()
    expected = _run_in_float64(tiny)
    if expected is not None:
        # In float64 next to no code is near enough to a tie to come out differently through AOTAutograd.
        results = _run_compiled(tiny)
        record.differences["float64"] = relative_difference([results["rotated"]], [expected])
    record.differences["reference"] = relative_difference([results["4 bits, AOT"]], [results["4 bits"]])


SETTINGS: dict[str, dict[str, Any]] = {
    "rotated": {"w_bits": 16, "a_bits": 16, "kv_bits": 16, "nested_backend": "eager"},
    "4 bits": {"nested_backend": "eager"},
    "4 bits, AOT": {"nested_backend": "aot_eager"},
}


def _run(model: Callable[..., Any], inputs: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return first_logits(model(**inputs))


def _run_compiled(tiny: TinyDecoder) -> dict[str, torch.Tensor]:
    """Logits under every setting. Dynamo traces the model once for all of them, for that takes most of the time."""
    active = ""

    def compile_all(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled = {name: quarot(gm, example_inputs, options=options) for name, options in SETTINGS.items()}
        return lambda *arguments: compiled[active](*arguments)

    torch._dynamo.reset()
    # Sizes that are known: rotations are placed alike in all runs, and 4 bits round alike.
    compiled = torch.compile(tiny.model, backend=compile_all, dynamic=False)
    results = {}
    for active in SETTINGS:
        results[active] = _run(compiled, tiny.inputs)
    return results


def _run_in_float64(tiny: TinyDecoder) -> torch.Tensor | None:
    """Logits of the eager model, or None where it cannot run in float64: some mix in tensors of float32."""
    implementations = [lambda: None]
    if hasattr(tiny.model, "set_experts_implementation"):  # the grouped product knows no float64
        implementations.append(lambda: tiny.model.set_experts_implementation("batched_mm"))
    for choose in implementations:
        try:
            choose()
            return _run(tiny.model, tiny.inputs)
        except RuntimeError:
            continue
    return None


# -- the command -----------------------------------------------------------------------------------


def main() -> int:
    """Measure what the command line names, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all by default, else what was written of others stays")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    wanted = [(name, category) for category in CATEGORIES for name in model_types(category)]
    wanted = [(name, category) for name, category in wanted if not arguments.names or name in arguments.names]

    start, records = time.perf_counter(), []
    console = Console(stderr=True)
    context = multiprocessing.get_context("spawn")
    # A process does a few only, since Dynamo's caches grow.
    with context.Pool(arguments.jobs, maxtasksperchild=12) as pool, Progress(console=console) as progress:
        task = progress.add_task("architectures", total=len(wanted))
        for record in pool.imap_unordered(_measure, wanted):
            records.append(record)
            progress.advance(task)
            progress.print(_line(records[-1]), markup=False, soft_wrap=True)
    records.sort(key=lambda record: wanted.index((record.name, record.category)))
    failed = [record for record in records if record.failures()]
    seconds = time.perf_counter() - start
    if arguments.names and not arguments.dry:
        update(records)
    elif not arguments.dry:
        write(records, seconds, arguments.jobs)
    console.print(f"{len(records) - len(failed)} passed, {len(failed)} failed in {seconds / 60:.1f} minutes")
    return bool(failed)


def _measure(one: tuple[str, str]) -> Record:
    return measure(*one)


def _line(record: Record) -> str:
    failures = f"FAILED {'; '.join(record.failures())}" if record.failures() else "ok"
    differences = " ".join("-" if d is None else f"{d:.0e}" for d in record.differences.values())
    return f"{record.name} {failures} | {differences} | {record.coverage} | {record.seconds:.0f} s"


def write(records: list[Record], seconds: float, jobs: int) -> None:
    """Write the data and the table under ``docs``."""
    data = {
        "command": shlex.join(["python", "tests/sweep.py", *sys.argv[1:]]),
        **describe_environment("cpu"),
        "minutes": round(seconds / 60, 1),
        "jobs": jobs,
        "limits": LIMITS,
        "architectures": [asdict(record) for record in records],
    }
    _write(data)


def update(records: list[Record]) -> None:
    """Replace what the data says of some architectures, and say by which command."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    data.setdefault("updates", []).append(shlex.join(["python", "tests/sweep.py", *sys.argv[1:]]))
    places = {row["name"]: place for place, row in enumerate(data["architectures"])}
    for record in records:
        data["architectures"][places[record.name]] = asdict(record)
    _write(data)


def _write(data: dict[str, Any]) -> None:
    from architecture_table import render

    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (DOCS / "architectures.md").write_text(render(data), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
