"""Tasks of lm_eval, on small models: scores are those that float64 arithmetic on transformers' logits gives."""

from __future__ import annotations

import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from octavo import EvaluateError, MissingExtra
from octavo.integrations.language_model import load_language_model
from octavo.report import TaskReport, TaskScore
from tests.tiny_checkpoints import language_model

pytest.importorskip("lm_eval", reason="needs lm-eval")

WORDS = ["one", "two", "tea", "red", "sun", "sea", "oak", "sky", "ice", "fig", "elk", "owl"]
QUESTIONS = [(f"The {WORDS[i]} is", [WORDS[(i + step) % 12] for step in (1, 5, 7)], i * 7 % 3) for i in range(12)]
PAGES = ["The quick brown fox jumps over the lazy dog.", "Once upon a time there was a king, and he had two sons."]

TASKS = {
    "first": """task: first
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/first.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
""",
    "both": """group: both
task: [first, second]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""",
    "pages": """task: pages
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pages.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: `first` and `second`, of 8 and 4 questions, `both` of them, and `pages`."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, questions in (("first", QUESTIONS[:8]), ("second", QUESTIONS[8:])):
        lines = (json.dumps({"q": q, "choices": choices, "a": a}) for q, choices, a in questions)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "pages.jsonl").write_text("\n".join(json.dumps({"page": page}) for page in PAGES))
    written = {**TASKS, "second": TASKS["first"].replace("first", "second")}
    for name, text in written.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture
def only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ten thousand tasks of lm_eval itself, which take seconds to list."""
    from octavo.integrations import lm_eval

    monkeypatch.setattr(lm_eval, "TaskManager", functools.partial(lm_eval.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """An int8 model with other norms than the float model's, so that answers change, that model, and a tokenizer."""
    folder = language_model(tmp_path_factory.mktemp("model") / "float")
    baseline, tokenizer = load_language_model(folder)
    model, _ = load_language_model(folder)
    octavo.quantize(model, "w8a8")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
    return model, baseline, tokenizer


def log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return float(sum(logits[place, token] for place, token in zip(places, continuation, strict=True)))


def right(model: Any, tokenizer: Any, question: tuple[str, list[str], int]) -> bool:
    text, choices, answer = question
    context = tokenizer(text).input_ids
    scores = [
        log_likelihood(model, context, tokenizer(f"{text} {choice}").input_ids[len(context) :]) for choice in choices
    ]
    return scores.index(max(scores)) == answer


def score(report: TaskReport, task: str) -> TaskScore:
    (found,) = (each for each in report.scores if each.task == task)
    return found


@pytest.mark.usefixtures("only_these")
def test_questions_of_two_models(models: tuple[Any, Any, Any], tasks: Path) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    model, baseline, tokenizer = models
    told: list[tuple[int, int]] = []
    report = evaluate_tasks(
        model, tokenizer, ["both"], baseline=baseline, include_path=tasks, batch_size=3,
        progress=lambda answered, total: told.append((answered, total)),
    )  # fmt: skip
    after = [right(model, tokenizer, question) for question in QUESTIONS]
    before = [right(baseline, tokenizer, question) for question in QUESTIONS]
    changes = [float(a) - float(b) for a, b in zip(after, before, strict=True)]
    assert any(changes), "the two models answer alike: this tests nothing"
    for name, part in (("first", slice(8)), ("second", slice(8, 12)), ("both", slice(12))):
        found = score(report, name)
        assert found.documents == len(after[part]) and found.higher_is_better
        assert found.value == pytest.approx(statistics.fmean(after[part]))
        assert found.baseline == pytest.approx(statistics.fmean(before[part]))
        assert found.error == pytest.approx(statistics.stdev(map(float, after[part])) / math.sqrt(found.documents))
        assert found.change_error == pytest.approx(statistics.stdev(changes[part]) / math.sqrt(found.documents))
        assert found.flips == pytest.approx(sum(map(abs, changes[part])) / found.documents)
    assert told[-1] == (36, 36) and len(told) == 72  # three choices of twelve questions, for two models


@pytest.mark.usefixtures("only_these")
def test_a_perplexity_is_no_mean_over_documents(models: tuple[Any, Any, Any], tasks: Path) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    model, baseline, tokenizer = models
    found = score(evaluate_tasks(model, tokenizer, ["pages"], baseline=baseline, include_path=tasks), "pages")
    begin = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    for judged, value in ((model, found.value), (baseline, found.baseline)):
        total = sum(
            log_likelihood(judged, begin, tokenizer(page, add_special_tokens=False).input_ids) for page in PAGES
        )
        words = sum(len(page.split()) for page in PAGES)
        assert value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert not found.higher_is_better and (found.error, found.change_error, found.flips) == (None, None, None)


@pytest.mark.usefixtures("only_these")
def test_the_first_documents_of_one_model(models: tuple[Any, Any, Any], tasks: Path) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    model, _, tokenizer = models
    found = score(evaluate_tasks(model, tokenizer, ["sec*"], limit=3, fewshot=1, include_path=tasks), "second")
    assert (found.documents, found.baseline, found.change_error, found.flips) == (3, None, None, None)


@pytest.mark.usefixtures("only_these")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "tasks is empty, expected names"),
        (["frist"], "no task, group or tag 'frist'; close to it: first; `lm_eval ls tasks`"),
        (["first", "zzz*"], "'zzz*'; `lm_eval ls tasks` lists them"),
    ],
)
def test_names_that_are_none(models: tuple[Any, Any, Any], tasks: Path, asked: list[str], told: str) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    with pytest.raises(EvaluateError) as raised:
        evaluate_tasks(models[0], models[2], asked, include_path=tasks)
    assert told in str(raised.value)


def test_a_folder_that_is_none(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    with pytest.raises(EvaluateError, match=r"include_path is '.*none', expected a folder"):
        evaluate_tasks(models[0], models[2], ["first"], include_path=tmp_path / "none")


def test_a_chat_template_that_is_not_there(models: tuple[Any, Any, Any], tasks: Path) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    with pytest.raises(EvaluateError, match=r"^chat is asked for, and the tokenizer has no chat template"):
        evaluate_tasks(models[0], models[2], ["first"], include_path=tasks, chat=True)


@pytest.mark.usefixtures("only_these")
@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        (("FOLDER/first.jsonl", "FOLDER/gone.jsonl"), EvaluateError, "the documents of own cannot be had: .*gone"),
        (("path: json", "path: nobody/has-these"), EvaluateError, "the documents .*nobody/has-these.*; they are down"),
        (
            ('"{{q}}"', "!function code.text"),
            MissingExtra,
            "own need the package nowhere_to_be_found, which is not inst",
        ),
    ],
)
def test_tasks_that_cannot_be_loaded(
    models: tuple[Any, Any, Any], tmp_path: Path, changed: tuple[str, str], error: type[Exception], told: str
) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    text = TASKS["first"].replace("task: first", "task: own").replace(*changed).replace("FOLDER", str(tmp_path))
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "first.jsonl").write_text(json.dumps({"q": "a", "choices": ["b"], "a": 0}))
    (tmp_path / "code.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(error, match=f"^tasks: {told}"):
        evaluate_tasks(models[0], models[2], ["own"], include_path=tmp_path)


@pytest.mark.slow
def test_tasks_of_lm_eval_itself_are_known(models: tuple[Any, Any, Any]) -> None:
    from octavo.integrations.lm_eval import evaluate_tasks

    with pytest.raises(EvaluateError, match=r"close to it: .*hellaswag"):
        evaluate_tasks(models[0], models[2], ["helaswag"])
