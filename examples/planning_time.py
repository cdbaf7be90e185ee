"""How long the compiler takes to plan models of the shapes of Llama 3, and what it makes of their weights.

    python examples/planning_time.py --shapes 8B 70B 405B --json planning.json

The models are on the meta device: they have shapes and no weights, so that all of this fits into a laptop.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import quarot_fx
from quarot_fx.cli.environment import describe_environment

SHAPES = {  # layers, hidden size, intermediate size, heads
    "8B": (32, 4096, 14336, 32),
    "70B": (80, 8192, 28672, 64),
    "405B": (126, 16384, 53248, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--layers", type=int, help="only so many layers of each")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()

    results = [plan(shape, options.layers or SHAPES[shape][0]) for shape in options.shapes]
    table = Table(
        "shape", "layers", "hidden", "nodes", "capture", "placement", "all passes", "together", "cpu", "weights"
    )
    for r in results:
        seconds = (f"{r[name]:.1f} s" for name in ("capture", "placement", "passes", "seconds", "cpu_seconds"))
        before, after = r["weight_bytes"]
        weights = f"{before / 2**30:,.1f} GiB -> {after / 2**30:,.1f} GiB"
        table.add_row(r["shape"], str(r["layers"]), str(r["hidden_size"]), str(r["nodes"]), *seconds, weights)
    Console().print(table)
    if options.json:
        record = {
            "command": shlex.join(["python", "examples/planning_time.py", *sys.argv[1:]]),
            **describe_environment("cpu"),
            "results": results,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def plan(shape: str, layers: int) -> dict[str, Any]:
    """Plan one model with the default options; all times are in seconds."""
    _, hidden_size, intermediate_size, heads = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()  # which heeds the dtype
    start, cpu_start = time.perf_counter(), time.process_time()
    report = quarot_fx.explain(model, {"input_ids": torch.arange(16)[None], "use_cache": False})
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    by_pass = {one.name: one.seconds for one in report.passes}
    passes = sum(by_pass.values())
    return {
        "shape": shape,
        "layers": layers,
        "hidden_size": hidden_size,
        "nodes": report.passes[0].nodes_before,
        "capture": seconds - passes,
        "placement": by_pass["place-rotations"],
        "passes": passes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # less than seconds where other programs run besides
        "online_transforms": len(report.plan.online),
        "weight_bytes": report.weight_bytes,
    }


if __name__ == "__main__":
    main()
