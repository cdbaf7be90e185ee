"""docs/architectures.md, of the data that the sweep wrote: ``python tests/architecture_table.py`` renders it anew."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
KEPT = (
    "to quantise it"  # how every reason ends of what keeps its precision unless asked for: heads, routers, embeddings
)
HEADER = """# Architectures

Every causal language model that transformers {versions[transformers]} registers, as a tiny random instance, through
`torch.compile(model, backend="quarot")`. {counts}

| column | what it says |
|---|---|
| graphs | that Dynamo makes of the model; where there is more than one, what passes between them is canonical |
| rotated graph | against the captured one, all casts promoted to float64: relative difference of all outputs |
| float64, float32 | compiled, not quantised, against eager, which casts norms to float32; a dash: it has no float64 |
| W4A4KV4 | relative difference of the logits from float32; weights are random, so only that it is finite says much |
| quantised, rotated | linear layers, a stack of experts as one, without heads and routers, which keep their precision |
| K, V | reads of keys and values by attention that are quantised, and their number |
| online | transforms that run with the model, a decoder layer |

`{command}` wrote this page and [its data](results/architectures.json), every decline with its reason included:
{minutes} minutes in {jobs} processes of one thread on {device}, of which capture and planning of the decoders
took {planning:.1f}; torch {versions[torch]}, Python {versions[python]}. Limits: {limits}.{updates}
"""


def render(data: dict[str, Any]) -> str:
    """Return the page."""
    records = data["architectures"]
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in data["limits"].items())
    planning = sum(r["planning"] for r in records if r["category"] == "decoder") / 60 / data["jobs"]
    updates = "".join(
        f" Measured again since, with the same versions: `{command}`." for command in data.get("updates", ())
    )
    filled = {**data, "limits": limits, "updates": updates, "counts": _counts(records), "planning": planning}
    page = [HEADER.format(**filled)]
    for category in dict.fromkeys(record["category"] for record in records):
        page += [f"## {category}\n", _table([r for r in records if r["category"] == category])]
    page += ["## What is left, and why\n", *_remarks(records)]
    return "\n".join(page) + "\n"


def _counts(records: list[dict[str, Any]]) -> str:
    parts = []
    for category, found in _by_category(records).items():
        complete = [r for r in found if _is_complete(r)]
        parts.append(
            f"{len(found)} of category *{category}*: {sum(not r['error'] for r in found)} compile and are exact, "
            f"{len(complete)} with every linear layer that the graphs hold quantised and rotated."
        )
    return " ".join(parts)


def _by_category(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    categories = dict.fromkeys(record["category"] for record in records)
    return {category: [r for r in records if r["category"] == category] for category in categories}


def _is_complete(record: dict[str, Any]) -> bool:
    c = record["coverage"]
    return bool(c) and c["quantized"] == c["linears"] == c["free"] + c["online"] and not record["unread"]


def _table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| architecture | graphs | rotated graph | float64 | float32 | W4A4KV4 | quantised | rotated (free + online) "
        "| K | V | online |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        d, c = record["differences"], record["coverage"]
        if record["error"]:
            lines.append(f"| {record['name']} | {record['error']} |" + " |" * 9)
            continue
        cells = [
            record["name"],
            record["graphs"],
            *(_number(d.get(name)) for name in ("graph", "float64", "float32")),
            _number(record["four_bits"], ".2f"),
            f"{c['quantized']}/{c['linears']}",
            f"{c['free'] + c['online']}/{c['linears']} ({c['free']} + {c['online']})",
            f"{c['quantized_keys']}/{c['keys']}",
            f"{c['quantized_values']}/{c['values']}",
            f"{c['transforms'] / record['layers']:g}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str = ".0e") -> str:
    return "-" if value is None else format(value, form)


def _remarks(records: list[dict[str, Any]]) -> list[str]:
    """What is not rewritten, a line a reason, with the architectures that it concerns."""
    concerned: dict[str, Counter[str]] = {}
    for record in records:
        reasons = {reason: count for reason, count in record["declined"].items() if not reason.endswith(KEPT)}
        reasons |= {f"`{name}` is read by {by}": 1 for name, by in record["others"].items()}
        reasons |= {f"`{name}` is read by no graph": 1 for name in record["unread"]}
        for reason, count in reasons.items():
            concerned.setdefault(reason, Counter())[record["name"]] += count
    lines = []
    for reason, names in sorted(concerned.items()):
        lines.append(f"- {reason}: " + ", ".join(f"{name} ({count})" for name, count in names.items()))
    return lines


if __name__ == "__main__":
    data = json.loads((DOCS / "results" / "architectures.json").read_text(encoding="utf-8"))
    (DOCS / "architectures.md").write_text(render(data), encoding="utf-8")
