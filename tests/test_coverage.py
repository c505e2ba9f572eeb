"""Coverage: the bytes add up, nothing is missing, and it says the same after a round trip."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import octavo
from octavo.coverage import Coverage
from tests.tiny_models import Net, build, llama, tied_llama


def test_a_row_for_every_float_parameter_by_its_old_name_and_shape() -> None:
    model = build(llama, torch.bfloat16)
    before = {name: (tuple(p.shape), p.nbytes) for name, p in model.named_parameters()}
    report = octavo.quantize(model, "w8a16")
    assert {row.name: (row.shape, row.bytes_before) for row in report.rows} == before
    assert report.bytes_before == sum(nbytes for _, nbytes in before.values())


def test_bytes_after_are_those_in_memory() -> None:
    model = build(llama, torch.float16)
    report = octavo.quantize(model, "w8a16", include=["OutputHead"])
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.bytes_after == held
    assert report.quantized_fraction + sum(
        row.bytes_before for row in report.rows if not row.scheme
    ) / report.bytes_before == pytest.approx(1)


def test_shared_tensors_count_once_and_say_whose_they_are() -> None:
    model = build(tied_llama)
    report = octavo.quantize(model, "w8a16", include=["lm_head"])
    (head,) = [row for row in report.rows if row.name == "lm_head.weight"]
    assert (head.bytes_before, head.bytes_after, head.reason) == (0, 0, "tied to model.embed_tokens.weight")
    assert report.bytes_before == sum(p.nbytes for p in build(tied_llama).parameters())


def test_a_float_model_has_one_too() -> None:
    report = octavo.coverage(Net())
    assert report.quantized_fraction == 0 and report.bytes_before == report.bytes_after
    assert all(row.reason for row in report.rows)


def test_it_can_be_asked_again_and_survives_casts() -> None:
    model = Net()
    report = octavo.quantize(model, "w8a16", include=["lm_head"])
    assert octavo.coverage(model) == report
    quantized = {row.name for row in report.rows if row.scheme}
    assert {row.name for row in octavo.coverage(model.half()).rows if row.scheme} == quantized


def test_json_round_trip() -> None:
    report = octavo.quantize(Net(), "w8a16")
    data = json.loads(report.to_json())
    assert Coverage.from_dict(data) == report
    assert data["quantized_fraction"] == pytest.approx(report.quantized_fraction)


def test_the_table_gathers_layers_that_differ_in_their_number() -> None:
    report = octavo.quantize(build(llama), "w8a16")
    shown = str(report)
    assert "model.layers.*.mlp.up_proj.weight  x2" in shown and "opt-in: include 'OutputHead'" in shown
    assert len(shown.splitlines()) < len(report.rows) + 4


def test_unasked_counts_only_what_the_recipe_did_not_ask_for() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare = nn.Parameter(torch.randn(16, 16))
            self.linear = nn.Linear(16, 16, bias=False)
            self.other = nn.Linear(16, 16, bias=False)

    with pytest.warns(octavo.OctavoWarning):
        report = octavo.quantize(Model(), "w8a16", ignore=["other"])
    assert report.unasked_fraction == pytest.approx(1 / 3) and report.quantized_fraction == pytest.approx(1 / 3)
    assert sum(report.float_reasons().values()) == 2 * 16 * 16 * 4
