"""`octavo eval --tasks` shows what `evaluate_tasks` finds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

TASK = """task: numbers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/numbers.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: [odd, even]
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task `numbers`, of five questions, and no others of lm_eval's."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from octavo.integrations import lm_eval

    monkeypatch.setattr(lm_eval, "TaskManager", functools.partial(lm_eval.TaskManager, include_defaults=False))
    lines = (f'{{"q": "The number {n} is", "a": {(n + 1) % 2}}}' for n in range(5))
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines))
    (tmp_path / "numbers.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    return tmp_path


def test_scores_next_to_the_baselines(run: Run, tiny: Path, tiny_int8: Path, tasks: Path) -> None:
    asked = ("eval", tiny_int8, "--baseline", tiny, "--tasks", "numbers", "--include-path", tasks)
    ran = run(*asked, "--json")
    (score,) = ran.data["scores"]
    assert (score["task"], score["metric"], score["documents"]) == ("numbers", "acc", 5)
    assert 0 <= score["value"] <= 1 and score["flips"] is not None and ran.data["baseline"] == str(tiny)
    assert ran.err == ""
    shown = run(*asked)
    assert shown.out.startswith("Tasks\n") and f"{score['value']:.4f}" in shown.out and shown.err == ""


def test_of_one_model_the_first_documents(run: Run, tiny_int8: Path, tasks: Path) -> None:
    ran = run("eval", tiny_int8, "--tasks", "numbers,", "--include-path", tasks, "--limit", 2, "--json")
    assert ran.data["scores"][0]["documents"] == ran.data["limit"] == 2
    assert "baseline" not in ran.data and ran.data["scores"][0]["baseline"] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--limit", 2), "--limit is for --tasks, which is not given"),
        (("--chat",), "--chat is for --tasks"),
        (("--fewshot", 0), "--fewshot is for --tasks"),
        (("--tasks", "numbers", "--window", 64), "--window is for a text, and --tasks are judged instead"),
        (("--tasks", "numbers", "--tokens", 64), "--tokens is for a text"),
        (("--tasks", ",", "--include-path", "."), "tasks is empty, expected names"),
        (("--tasks", "nmbers", "--include-path", "FOLDER"), "no task, group or tag 'nmbers'; close to it: numbers"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, tiny_int8: Path, tasks: Path, options: tuple[Any, ...], told: str
) -> None:
    ran = run("eval", tiny_int8, *(tasks if option == "FOLDER" else option for option in options))
    assert ran.code == 1 and told in ran.err and ran.out == ""


@pytest.mark.usefixtures("tasks")
def test_names_are_looked_up_before_a_model_is(run: Run, tmp_path: Path) -> None:
    ran = run("eval", tmp_path / "no model", "--tasks", "nmbers", "--include-path", tmp_path)
    assert ran.code == 1 and "no task, group or tag 'nmbers'" in ran.err


@pytest.mark.parametrize("count", ["-1", "0.5", "few"])
def test_a_number_of_examples_that_is_none(run: Run, count: str) -> None:
    ran = run("eval", "model", "--tasks", "numbers", "--fewshot", count)
    assert ran.code == 2 and f"argument --fewshot: invalid whole number value: '{count}'" in ran.err


def test_without_lm_eval(run: Run, tiny_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "octavo.integrations.lm_eval", raising=False)
    ran = run("eval", tiny_int8, "--tasks", "numbers")
    assert ran.code == 1 and "lm_eval is needed for --tasks: pip install 'octavo[lm-eval]'" in ran.err
