"""Examples run as a reader would run them, and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    ("quickstart.py",): ["float32   next token", "W8A8KV8   next token", "W4A4KV4   next token"],
    ("look_at_the_graph.py",): [
        "quarot.rotate.default",
        "hadamard-176 before down",
        "passes",
        "linear layers and caches",
    ],
    ("own_pass.py",): ["quarot.mean_square.default", "merge-scales       matched 1", "fold-gains         matched 1"],
    ("planning_time.py", "--shapes", "405B", "--layers", "1"): ["placement", "13.8 GiB -> 9.3 GiB"],
}


def run(*command: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_")} == {
        name for name, *_ in SAYS
    }


@pytest.mark.parametrize("command", SAYS, ids=" ".join)
def test_example(command: tuple[str, ...]) -> None:
    output = run(*command)
    assert all(text in output for text in SAYS[command]), output


def test_unit_test_of_the_example() -> None:
    assert "3 passed" in run("-m", "pytest", "-p", "no:cacheprovider", "-v", "test_own_pass.py")
