"""How long the compiler takes to plan a deep model: every pass, on a decoder with small random weights.

    python examples/planning_time.py --layers 32 80

The time depends on the number of operators, not on their sizes, so a narrow model tells that of a wide one.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from quarot_fx import QuarotConfig
from quarot_fx.inspection import capture_one_graph
from quarot_fx.passes.pipeline import build_pipeline, run_pipeline
from quarot_fx.store import WeightStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80])
    table = Table("layers", "nodes", "capture", "analysis and placement", "rotate", "all passes up to there")
    for layers in parser.parse_args().layers:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
            num_hidden_layers=layers,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        start = time.perf_counter()
        captured, arguments = capture_one_graph(model, {"input_ids": torch.arange(16)[None], "use_cache": False})
        capture = time.perf_counter() - start
        program = captured.bind(arguments, WeightStore())
        reports = run_pipeline(program, build_pipeline(QuarotConfig(stop_after="rotate"))[:-1]).reports
        seconds = {report.name: report.seconds for report in reports}
        columns = (capture, seconds["place-rotations"], seconds["rotate"], sum(seconds.values()))
        table.add_row(str(layers), str(reports[0].nodes_before), *(f"{s:.1f} s" for s in columns))
    Console().print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", table)


if __name__ == "__main__":
    main()
