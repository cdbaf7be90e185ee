"""Which tasks are measured, and what lm-eval says of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from quarot_fx.errors import NotFoundError, OptionError, nearest
from quarot_fx.extras import import_extra

ACCURACIES = ("acc_norm", "acc")  # what the paper gives of a task, the first that it has
RESAMPLINGS = 1000  # for the standard error of what has none in closed form
MOST_GRAPHS = 64  # of one function of a model; Dynamo would run it uncompiled after that, and here fails


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval.

    Attributes:
        names: of tasks, groups or tags.
        limit: only the first questions of each task.
        batch_size: sequences in a batch.
        manager: lm-eval's own, which finds tasks by name.
    """

    names: tuple[str, ...]
    limit: int | None
    batch_size: int
    manager: Any

    @classmethod
    def find(cls, names: Sequence[str], include_path: Path | None, limit: int | None, batch_size: int) -> Tasks:
        """Find tasks by name, those in a folder first.

        Raises:
            MissingExtraError: lm-eval is not installed.
            NotFoundError: there is no such folder or task; the nearest one is suggested.
            OptionError: no task is named.
        """
        names = [name.strip() for name in names if name.strip()]
        if not names:
            raise OptionError(name="tasks", value="", reason="names no task; separate names by commas")
        import_extra("lm_eval", extra="eval")
        manager_class = import_extra("lm_eval.tasks", extra="eval").TaskManager
        if include_path is not None and not include_path.is_dir():
            raise NotFoundError(kind="folder", name=str(include_path), remedy="Give one with lm-eval's .yaml files.")
        folder = None if include_path is None else str(include_path)
        manager = None
        if folder is not None:  # reading those that lm-eval comes with takes long, and may not be needed
            manager = manager_class(include_path=folder, include_defaults=False)
        if manager is None or not set(names) <= set(manager.all_tasks):
            manager = manager_class(include_path=folder)
        for name in names:
            if name not in manager.all_tasks:
                remedy = "`lm-eval ls tasks` lists those that there are, --include-path adds a folder of your own."
                raise NotFoundError(kind="task", name=name, remedy=remedy + nearest(name, manager.all_tasks))
        return cls(tuple(names), limit, batch_size, manager)

    @property
    def title(self) -> str:
        """What is measured, in words."""
        return f"tasks, {'all' if self.limit is None else f'the first {self.limit}'} questions"

    @property
    def about(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        return {"tasks": {"names": list(self.names), "limit": self.limit, "batch_size": self.batch_size}}

    def measure(self, runnable: Any, network: Any, tokenizer: Any) -> dict[str, Any]:
        """Return what lm-eval measures of a compiled model, for JSON.

        Args:
            runnable: what ``torch.compile`` returned, or the model itself.
            network: the model.
            tokenizer: the model's.

        Returns:
            ``tasks``: of each task and group, by name, the number of ``questions`` and its ``metrics``, each with a
            ``value`` and, where it is known, a ``stderr``; ``subtasks``, likewise, that groups are made of; ``average``
            accuracy of the tasks; ``shapes`` that the model was called at, ``graphs`` that were compiled for them, and
            ``task_seconds``.

        Raises:
            NotFoundError: the data of a task cannot be reached.
            OptionError: a task generates text.
        """
        import lm_eval

        from quarot_fx.cli.harness import CompiledLM

        model = CompiledLM(runnable, network, tokenizer, self.batch_size)
        start, graphs_before = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            with _one_graph_a_shape():
                answer = lm_eval.simple_evaluate(
                    model,
                    tasks=list(self.names),
                    task_manager=self.manager,
                    limit=self.limit,
                    bootstrap_iters=RESAMPLINGS,
                    log_samples=False,
                )
        except OSError as error:
            remedy = f"Tasks read their data from the Hugging Face hub, or from files that they name: {error}"
            raise NotFoundError(kind="data of tasks", name=",".join(self.names), remedy=remedy) from error
        found = {name: _task(result) for name, result in answer["results"].items()}
        found = {name: task for name, task in found.items() if task["metrics"]}  # a group need not have any
        parts = {part for group in found for part in answer["group_subtasks"].get(group, ())}
        tasks = {name: task for name, task in found.items() if name not in parts}
        return {
            "tasks": tasks,
            "subtasks": {name: task for name, task in found.items() if name in parts},
            "average": average(tasks.values()),
            "shapes": {f"{batch}x{length}": calls for (batch, length), calls in sorted(model.shapes.items())},
            "graphs": counters["stats"]["unique_graphs"] - graphs_before,
            "task_seconds": time.perf_counter() - start,
        }


def _one_graph_a_shape() -> AbstractContextManager[None]:
    return torch._dynamo.config.patch(
        recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=2**16, fail_on_recompile_limit_hit=True
    )


def _task(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return one of lm-eval's results without the names of filters: ``acc,none`` is ``acc``."""
    metrics = {}
    for key, value in result.items():
        name, comma, filtered_by = key.partition(",")
        if comma and not name.endswith("_stderr"):
            label = name if filtered_by == "none" else key
            stderr = result.get(f"{name}_stderr,{filtered_by}")
            metrics[label] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
    return {"questions": result.get("sample_len"), "metrics": metrics}


def headline(task: Mapping[str, Any]) -> tuple[str, float]:
    """Return the metric of a task that tables show, and its value: normalised accuracy, or accuracy, or the first."""
    metrics = task["metrics"]
    name = next((accuracy for accuracy in ACCURACIES if accuracy in metrics), next(iter(metrics)))
    return name, metrics[name]["value"]


def average(tasks: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean accuracy of tasks, as the paper gives it; ``None`` if any of them has none."""
    headlines = [headline(task) for task in tasks]
    if not headlines or any(name not in ACCURACIES for name, _ in headlines):
        return None
    return sum(value for _, value in headlines) / len(headlines)
