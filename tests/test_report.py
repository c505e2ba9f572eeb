from __future__ import annotations

import json
import math

from octavo.report import Comparison, LayerQuality, NotCompared, TaskReport, TaskScore

LAYERS = tuple(LayerQuality(f"layers.{i}", "QuantLinear", db) for i, db in enumerate((40.0, math.inf, 12.25, 30.0)))
FOUND = Comparison(3, 120, 0.00123, 0.9875, 28.21, 0.99987, 0.9912, LAYERS, (NotCompared("head", "did not run"),))


def test_str_shows_the_measures_the_worst_layers_and_what_is_missing() -> None:
    assert str(FOUND) == (
        "int8 against float (batches: 3, positions: 120)\n"
        "measure                    value\n"
        "--------------------------------\n"
        "KL(float || int8)   0.00123 nats\n"
        "top-1 agreement            98.8%\n"
        "output SQNR              28.2 dB\n"
        "cosine, mean            0.999870\n"
        "cosine, lowest          0.991200\n"
        "\n"
        "The 4 layers of lowest SQNR, of 4\n"
        "layer      kind          output SQNR\n"
        "------------------------------------\n"
        "layers.2   QuantLinear       12.2 dB\n"
        "layers.3   QuantLinear       30.0 dB\n"
        "layers.0   QuantLinear       40.0 dB\n"
        "layers.1   QuantLinear        inf dB\n"
        "\n"
        "Quantized layers not compared\n"
        "layer   why\n"
        "-------------------\n"
        "head    did not run"
    )


def test_without_logits_or_layers_there_is_one_table_and_no_number_for_kl() -> None:
    found = Comparison(1, 2, None, None, math.inf, 1.0, 1.0)
    assert len(found.tables()) == 1
    assert found.tables()[0].rows[:3] == (
        ("KL(float || int8)", "-"),
        ("top-1 agreement", "-"),
        ("output SQNR", "inf dB"),
    )


def test_worst_layers_come_worst_first() -> None:
    assert [layer.name for layer in FOUND.worst_layers(2)] == ["layers.2", "layers.3"]
    assert len(FOUND.tables(count=2)[1].rows) == 2


def test_json_is_strict_and_an_exact_layer_is_null() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(FOUND.to_json(), parse_constant=refuse)
    assert data == FOUND.to_dict()
    assert data["layers"][1] == {"name": "layers.1", "kind": "QuantLinear", "sqnr_db": None}
    assert data["not_compared"] == [{"name": "head", "reason": "did not run"}]
    assert (data["kl"], data["top1"], data["positions"]) == (0.00123, 0.9875, 120)


SCORES = (
    TaskScore("arc", "acc", True, 200, 0.5, 0.0354, 0.51, 0.01, 0.02),
    TaskScore("pages", "word_perplexity", False, 2, 16.4, None, 16.5),
)


def test_task_scores_next_to_a_baseline() -> None:
    assert str(TaskReport(SCORES)) == (
        "Tasks\n"
        "task    metric            better   documents   baseline     model    change       +-   flips\n"
        "--------------------------------------------------------------------------------------------\n"
        "arc     acc               higher         200     0.5100    0.5000   -0.0100   0.0100    2.0%\n"
        "pages   word_perplexity   lower            2    16.5000   16.4000   -0.1000"
    )


def test_task_scores_alone_have_their_own_error() -> None:
    alone = TaskReport((TaskScore("arc", "acc", None, 200, 0.5, 0.0354),))
    assert alone.table(models=("", "int8")).columns == ("task", "metric", "better", "documents", "int8", "+-")
    assert alone.table().rows == (("arc", "acc", "", "200", "0.5000", "0.0354"),)
    assert json.loads(alone.to_json())["scores"][0]["baseline"] is None
