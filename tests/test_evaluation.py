"""Zero-shot tasks of the compiled model, by lm-eval: tiny models, tasks of a few questions in a folder of their own."""

from __future__ import annotations

import json

import pytest
from commands import run
from models import byte_tokenizer, tiny_model

from quarot_fx.cli.models import compile_model
from quarot_fx.cli.settings import parse_setting
from quarot_fx.cli.tasks import Tasks

pytest.importorskip("lm_eval", reason="zero-shot tasks need the extra `eval`")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quarot_fx.cli.harness import CompiledLM, padded_length

QUESTIONS = [
    ("Snow is", ["white", "a kind of fish"], 0),
    ("Two and two make", ["five", "four"], 1),
    ("A compiler, when it is given a program that is right, gives a program that is", ["fast", "wet"], 0),
    ("Birds", ["bark", "sing"], 1),
    ("After Monday comes", ["Tuesday", "the letter B"], 0),
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
"""
MULTIPLE = """doc_to_choice: answers
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATING = """metric_list:
  - metric: exact_match
generation_kwargs:
  until: ["."]
"""


def write_task(folder, name, kind="multiple_choice", target="label", rest=MULTIPLE, data="questions.jsonl"):
    text = CHOICE.format(name=name, data=folder / data, kind=kind, target=target)
    (folder / f"{name}.yaml").write_text(text + rest, encoding="utf-8")


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A folder of tasks: one that can be measured, one that generates, and one without its data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "answers": answers, "label": label} for q, answers, label in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_task(folder, "tiny_choice")
    write_task(folder, "tiny_essay", kind="generate_until", target="question", rest=GENERATING)
    write_task(folder, "tiny_lost", data="absent.jsonl")
    return folder


@pytest.fixture
def no_default_tasks(monkeypatch):
    """Have lm-eval find tasks in the given folder only: to list its own ten thousand takes long."""

    def only_the_folder(include_path=None, include_defaults=False):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_the_folder)


def requests():
    """A request for every answer, as lm-eval makes them."""
    pairs = [(question, f" {answer}") for question, answers, _ in QUESTIONS for answer in answers]
    return [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]


def test_lengths_are_padded_to_few():
    assert [padded_length(length, 100) for length in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]
    assert len({padded_length(length, 2048) for length in range(1, 2049)}) == 7


def test_padding_changes_no_likelihood():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    ours = CompiledLM(model, model, tokenizer, batch_size=4)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, prefix_token_id=1)
    (found, expected) = (lm.loglikelihood(requests(), disable_tqdm=True) for lm in (ours, theirs))
    assert [likelihood for likelihood, _ in found] == pytest.approx(
        [likelihood for likelihood, _ in expected], abs=1e-4
    )
    assert set(ours.shapes) == {(4, 32), (4, 128)}


def test_there_is_one_graph_a_shape_and_it_is_the_compiled_model_that_answers(task_folder, graphs):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    tasks = Tasks.find(["tiny_choice"], task_folder, limit=None, batch_size=2)
    calls = []

    def record(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape)
        return compiled(*args, **kwargs)

    compiled = compile_model(model, parse_setting("W4A4KV4"), "eager")
    result = tasks.measure(record, model, tokenizer)
    assert {f"{batch}x{length}" for batch, length in calls} == set(result["shapes"])
    assert sum(result["shapes"].values()) == len(calls)
    assert result["graphs"] == graphs() == len(result["shapes"]) == 2
    assert result["tasks"]["tiny_choice"]["questions"] == len(QUESTIONS)


def test_eval_measures_tasks_next_to_float(tiny_folder, task_folder, tmp_path):
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    settings = ("float", "rotated", "W4A4KV4-norot")
    output = run(
        "eval", tiny_folder, "--tasks", "tiny_choice", "--include-path", task_folder, "--batch-size", 3, "--limit", 4,
        "--settings", ",".join(settings), "--json", out, "--markdown", table,
    )  # fmt: skip
    record = json.loads(out.read_text())
    rows = {row["setting"]: row for row in record["results"]}
    assert tuple(rows) == settings
    assert record["tasks"] == {"names": ["tiny_choice"], "limit": 4, "batch_size": 3}
    assert "lm-eval" in record["versions"]
    assert "text" not in record
    for row in rows.values():
        task = row["tasks"]["tiny_choice"]
        assert task["questions"] == 4
        assert set(task["metrics"]) == {"acc", "acc_norm"}
        assert row["average"] == task["metrics"]["acc_norm"]["value"]
        assert "perplexity" not in row
        assert f"{row['average']:.4f} ± {task['metrics']['acc_norm']['stderr']:.4f}" in output
    assert rows["rotated"]["tasks"] == rows["float"]["tasks"]
    assert (rows["float"]["graphs"], rows["rotated"]["graphs"]) == (0, len(rows["rotated"]["shapes"]))
    lines = table.read_text().splitlines()
    assert lines[0] == "| setting | tiny_choice acc_norm |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == list(settings)
    assert "on " in lines[6]


@pytest.mark.usefixtures("no_default_tasks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "tiny_choise"), "found no task 'tiny_choise'"),
        (("--tasks", "tiny_choise"), "Did you mean 'tiny_choice'?"),
        (("--tasks", "tiny_lost"), "found no data of tasks 'tiny_lost'"),
        (("--tasks", "tiny_essay"), "option tasks='tiny_essay': generates text"),
        (("--tasks", "tiny_choice", "--include-path", "absent"), "found no folder 'absent'"),
        (("--tasks", ","), "names no task"),
        (("--limit", "3"), "option tasks=None: --include-path and --limit are about tasks"),
    ],
)
def test_mistakes_are_one_line(tiny_folder, task_folder, arguments, message):
    include = () if "--include-path" in arguments else ("--include-path", task_folder)
    output = run("eval", tiny_folder, "--settings", "float", *include, *arguments, exit_code=1)
    assert message in output
    assert "Traceback" not in output


def test_an_answer_longer_than_the_model_is_a_typed_error(tiny_folder, task_folder, tmp_path):
    row = {"question": "Say it", "answers": ["x" * 300, "y"], "label": 0}
    (tmp_path / "long.jsonl").write_text(json.dumps(row), encoding="utf-8")
    write_task(tmp_path, "tiny_long", data="long.jsonl")
    arguments = ("--tasks", "tiny_long", "--include-path", tmp_path, "--settings", "float")
    assert "an answer has 301 tokens, and the model takes 128" in run("eval", tiny_folder, *arguments, exit_code=1)
