"""Coverage: the bytes add up, nothing is missing, and it says the same after a round trip."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import octavo
from octavo.quantization.coverage import Coverage
from tests.tiny_models import Net, build, gpt2, llama, tied_llama


def test_a_row_for_every_float_parameter_by_its_old_name_and_shape() -> None:
    model = build(llama, torch.bfloat16)
    before = {name: (tuple(p.shape), p.nbytes) for name, p in model.named_parameters()}
    report = octavo.quantize(model, "w8a16")
    assert {row.name: (row.shape, row.bytes_before) for row in report.rows} == before
    assert report.bytes_before == sum(nbytes for _, nbytes in before.values())


def layers() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 4),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose1d(6, 9, 2, groups=3),
            "attention": nn.MultiheadAttention(8, 2, kdim=4, add_bias_kv=True),
            "embedding": nn.Embedding(5, 8),
            "lstm": nn.LSTM(3, 4),
            "norm": nn.BatchNorm1d(3),
        }
    )


@pytest.mark.filterwarnings("ignore::octavo.OctavoWarning")
def test_every_layer_kind_keeps_names_shapes_bytes_and_kinds() -> None:
    """Also those whose codes lie in another order."""
    model = layers()
    before = [(name, tuple(p.shape), p.nbytes) for name, p in model.named_parameters()]
    report = octavo.quantize(model, "w8a16", include=["Embedding"])
    assert sorted((row.name, row.shape, row.bytes_before) for row in report.rows) == sorted(before)
    kinds = {row.name: row.kind for row in report.rows if row.scheme}
    assert kinds["up.weight"] == "ConvTranspose1d" and kinds["attention.k_proj_weight"] == "MultiheadAttention"
    assert report.bytes_after == sum(
        value.nbytes
        for name, value in model.state_dict().items()
        if "running" not in name and "num_batches" not in name
    )


def test_the_conv1d_of_gpt2_keeps_its_shape() -> None:
    model = build(gpt2)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {row.name: row.shape for row in octavo.quantize(model, "w8a16").rows if row.bytes_before} == before


@pytest.mark.parametrize(
    ("make", "name", "reason", "asked"),
    [
        (lambda: nn.LSTM(3, 4), "weight_ih_l0", "not quantized", True),
        (lambda: nn.Bilinear(2, 3, 4), "weight", "3-D parameter of Bilinear", False),
        (lambda: nn.EmbeddingBag(5, 3), "weight", "EmbeddingBag is not a layer kind that octavo knows", False),
        (lambda: nn.LayerNorm(4), "weight", "1-D: biases and norms stay float", True),
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "1-D: biases and norms stay float", True),
        (lambda: nn.Linear(4, 4), "weight", "not quantized", True),
        (lambda: nn.Conv1d(4, 4, 3), "weight", "not quantized", True),
    ],
)
def test_why_a_parameter_is_float(make: Callable[[], nn.Module], name: str, reason: str, asked: bool) -> None:
    (row,) = [row for row in octavo.coverage(make()).rows if row.name == name]
    assert row.scheme is None and row.bytes_after == row.bytes_before
    assert re.match(reason, row.reason or "") and row.asked is asked


def test_a_complex_layer_is_listed_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.warns(octavo.OctavoWarning, match=r"int8 codes have no imaginary part \(53\.3%\)"):  # 128 of 240 bytes
        report = octavo.quantize(model, "w8a16")
    rows = {row.name: row for row in report.rows}
    assert (rows["1.weight"].scheme, rows["1.weight"].bytes_after) == (None, 16 * 8)
    assert rows["1.weight"].reason == "its weight is torch.complex64, and int8 codes have no imaginary part"
    assert rows["1.bias"].reason == "1-D: biases and norms stay float"


def test_a_sparse_weight_is_listed_with_its_reason_and_its_bytes() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 2, bias=False))
    sparse = model[0].weight.detach() * (torch.arange(30) == 7).view(5, 6)
    model[0].weight = nn.Parameter(sparse.to_sparse_coo())
    x = torch.randn(3, 6)
    with pytest.warns(octavo.OctavoWarning, match="stored as torch.sparse_coo"):
        (row, _) = octavo.quantize(model, "w8a16").rows
    assert (row.shape, row.scheme, row.bytes_before, row.bytes_after) == ((5, 6), None, 4 + 2 * 8, 4 + 2 * 8)
    torch.testing.assert_close(model[0](x), x @ sparse.T)


def test_reasons_live_on_with_the_model() -> None:
    model = build(llama)
    report = octavo.quantize(model, "w8a16", ignore=["re:.*down_proj"])
    assert octavo.coverage(copy.deepcopy(model)) == report
    assert octavo.coverage(pickle.loads(pickle.dumps(model))) == report


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
