"""Tasks of EleutherAI's lm-evaluation-harness: what a model knows, and what quantizing it took away.

    report = evaluate_tasks(model, tokenizer, ["arc_easy", "hellaswag"], baseline=float_model)

Both models answer the same documents. So the change of a score has an error of its own, that of the mean of the
documents' changes, which is smaller than the errors of the two scores; and equal scores do not hide answers that
changed: `flips` counts them (Dutta et al., "Accuracy is Not All You Need", https://arxiv.org/abs/2407.09141).
Probabilities are computed in fp32: in bf16, as lm_eval does by itself, the log of a sentence's is rounded to quarters.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from octavo.errors import EvaluateError, MissingExtra
from octavo.report import TaskReport, TaskScore

__all__ = ["FoundTasks", "evaluate_tasks", "find_tasks"]

Progress = Callable[[int, int], None]

Documents = dict[tuple[str, Any], float]
"""(task, id of a document) -> a metric of it."""


@dataclasses.dataclass(frozen=True)
class FoundTasks:
    """Names of tasks that lm_eval knows, none with * or ?, and where it found them."""

    names: tuple[str, ...]
    manager: TaskManager


def find_tasks(tasks: Sequence[str], *, include_path: str | Path | None = None) -> FoundTasks:
    """Names looked up, which takes seconds, before a model is loaded, which takes longer.

    tasks, include_path, Raises: as `evaluate_tasks` has them, for names and folders.
    Returns: what `evaluate_tasks` takes in the place of names.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluateError(f"include_path is {str(include_path)!r}, expected a folder with tasks in YAML files")
    if not tasks:
        raise EvaluateError("tasks is empty, expected names of lm_eval's tasks, such as 'arc_easy'")
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            close = difflib.get_close_matches(task, manager.all_tasks)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise EvaluateError(
                f"tasks: lm_eval has no task, group or tag {task!r}{hint}; `lm_eval ls tasks` lists them, and "
                "include_path adds a folder of your own"
            )
    return FoundTasks(tuple(manager.match_tasks(list(tasks))), manager)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | FoundTasks,
    *,
    baseline: Any = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    include_path: str | Path | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> TaskReport:
    """Scores of a causal language model of transformers, int8 or float, on tasks of lm_eval, next to a baseline's.

    model, tokenizer: as transformers has them; the model judged, and the tokenizer of both.
    tasks: names of tasks, groups and tags of lm_eval, with * and ? for several; or what `find_tasks` made of them.
    baseline: the float model, to be asked the same; None for scores of `model` alone.
    limit: documents of each task, the first ones; None for all.
    fewshot: examples before each document, where a task does not fix it; None for the task's own number.
    chat: put prompts into the tokenizer's chat template.
    include_path: a folder with tasks of your own, in lm_eval's YAML, where `tasks` are names.
    batch_size: requests at once.
    progress: called with (answered, of how many), for each model and kind of request anew.
    Returns: a row for each task and metric: the score, its standard error, and next to a baseline the change, the
        standard error of that, and the share of answers that changed between right and wrong. `print` it for a table.
    Raises: EvaluateError for no tasks, for a name that lm_eval does not know, for a folder that is none, for a chat
        template that is not there, and where the documents of a task cannot be had; MissingExtra for a package that a
        task needs; what else lm_eval raises for a task that it cannot run.
    """
    if chat and not tokenizer.chat_template:
        raise EvaluateError("chat is asked for, and the tokenizer has no chat template; leave it out")
    found = tasks if isinstance(tasks, FoundTasks) else find_tasks(tasks, include_path=include_path)

    def run(judged: Any) -> dict[str, Any]:
        # Loaded for each model anew, as a task draws its examples from a generator of its own.
        results: dict[str, Any] = lm_eval.evaluate(
            _Counted(judged, tokenizer, batch_size, progress),
            _loaded(found, fewshot),
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,  # errors are those of means over documents, below
        )
        return results

    return TaskReport(tuple(_scores(run(model), None if baseline is None else run(baseline))))


class _Counted(HFLM):  # type: ignore[misc]
    """A model as lm_eval runs it, which reports how many requests it has answered, and shows no progress bars."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress | None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._progress = progress or (lambda answered, total: None)
        self._answered = self._total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._begin(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._begin(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._begin(len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def _begin(self, total: int) -> None:
        self._answered, self._total = 0, total
        self.set_cache_hook(self)  # which is told of each answer

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self._answered += 1
        self._progress(self._answered, self._total)


def _loaded(found: FoundTasks, fewshot: int | None) -> Any:
    """The tasks with `fewshot` examples before each document, by the rules of lm_eval's command: none if a task says 0.

    Raises: EvaluateError if their documents cannot be had, MissingExtra for a package that they need.
    """
    names = ", ".join(found.names)
    try:
        loaded = found.manager.load(list(found.names))
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"tasks: {names} need the package {error.name}, which is not installed: pip install {error.name}"
        ) from error
    except OSError as error:
        raise EvaluateError(
            f"tasks: the documents of {names} cannot be had: {error}; they are downloaded from the Hugging "
            "Face Hub once, then found in its cache: check the network, or give tasks of your own by include_path"
        ) from error
    for task in loaded["tasks"].values():
        of_task = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=of_task or 0 if fewshot is None or of_task == 0 else fewshot)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _scores(results: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Iterator[TaskScore]:
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            better = results["higher_is_better"].get(task, {}).get(metric)
            documents = _documents(results, task, metric, filtered, value)
            score = TaskScore(task, name, better, _count(results, task), float(value), _error(documents))
            yield score if baseline is None else _against(score, documents, baseline, metric, filtered)


def _against(
    score: TaskScore, documents: Documents | None, baseline: Mapping[str, Any], metric: str, filtered: str
) -> TaskScore:
    before = float(baseline["results"][score.task][f"{metric},{filtered}"])
    of_baseline = _documents(baseline, score.task, metric, filtered, before)
    if documents is None or of_baseline is None:
        return score.against(before, None, None)
    changes = {document: value - of_baseline[document] for document, value in documents.items()}
    yes_or_no = {*documents.values(), *of_baseline.values()} <= {0.0, 1.0}
    flips = statistics.fmean(map(bool, changes.values())) if yes_or_no else None
    return score.against(before, _error(changes), flips)


def _tasks_of(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks that a group consists of, recursively; the task itself if it is not a group."""
    members = results["group_subtasks"].get(task)
    return [task] if not members else [part for member in members for part in _tasks_of(results, member)]


def _count(results: Mapping[str, Any], task: str) -> int:
    return sum(results["n-samples"][part]["effective"] for part in _tasks_of(results, task))


def _documents(results: Mapping[str, Any], task: str, metric: str, filtered: str, score: float) -> Documents | None:
    """The metric of each document, if the score is their mean; None if it is not, as for perplexity or F1."""
    values = {
        (part, sample["doc_id"]): sample[metric]
        for part in _tasks_of(results, task)
        for sample in results["samples"][part]
        if sample["filter"] == filtered and metric in sample["metrics"]
    }
    if not values or not all(isinstance(value, int | float) for value in values.values()):
        return None
    documents = {document: float(value) for document, value in values.items()}
    is_mean = math.isclose(statistics.fmean(documents.values()), score, rel_tol=1e-9, abs_tol=1e-12)
    return documents if is_mean else None


def _error(documents: Documents | None) -> float | None:
    """The standard error of a mean over documents."""
    if documents is None or len(documents) < 2:
        return None
    return statistics.stdev(documents.values()) / math.sqrt(len(documents))
