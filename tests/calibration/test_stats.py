"""What calibration saw is of one model, holds what static inputs need, and comes back from disk as it was."""

from __future__ import annotations

import collections
import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

import octavo
from octavo.calibration.calibrate import calibrate
from octavo.calibration.stats import Stats
from octavo.errors import CalibrateError
from tests.calibration.test_calibrate import assert_equal_stats, llama, recorded


def net(width: int = 4, layers: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (net(layers=1), "it has no layer '1' (1 such)"),
        (net(layers=4), "they do not know '2' (2 such)"),
        (net(width=6), "'0' had 4 input channels, expected 6"),
    ],
)
def test_statistics_of_another_model_are_refused_before_anything_changes(other: nn.Sequential, why: str) -> None:
    """Of the same architecture, so that names alone do not tell."""
    stats, before = calibrate(net(), [torch.randn(6, 4)]), {key: t.clone() for key, t in other.state_dict().items()}
    for use in (lambda: octavo.smooth(other, stats), lambda: octavo.quantize(other, "w8a8-static", stats=stats)):
        with pytest.raises(CalibrateError, match=re.escape(f"stats are of another model: {why}")):
            use()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("factors", "smoothed"),
    [
        ([1.0, 1.0, 4.0, 1.0], True),  # most channels may have been left as they are
        ([0.5, 2.0, 4.0, 0.25], True),
        ([1.0, 1.0, 1.0, 1.0], False),
        ([1.0, 1.004, 0.997, 1.0], False),  # rounded to bf16
        ([1.5, 2.0, 0.7, 3.0], False),  # trained further
    ],
)
def test_columns_that_powers_of_two_multiplied_were_smoothed(factors: list[float], smoothed: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[:, 4] = 0  # a column that nothing can be told by
        stats = octavo.calibrate(model, [torch.randn(2, 5)])
        model[0].weight[:, :4] *= torch.tensor(factors)
    with pytest.raises(CalibrateError, match="one of the two was smoothed") if smoothed else contextlib.nullcontext():
        stats.check_are_of(model)


def test_act_scales_that_lack_a_layer(tmp_path: Path) -> None:
    """A file of SmoothQuant's may be of some layers only: these get what they ask for, the others are named."""
    stats = calibrate(net(), [torch.randn(6, 4)])
    torch.save({"0": stats.observers["0"].amax}, tmp_path / "act_scales.pt")
    some = Stats.load_act_scales(tmp_path / "act_scales.pt")
    with pytest.raises(CalibrateError, match=r"stats know nothing of '1' \(1 such\), which is to have static inputs"):
        octavo.quantize(net(), "w8a8-static", stats=some)
    report = octavo.quantize(net(), octavo.Recipe.of("w8a8-static", ignore=["1"]), stats=some)
    assert {row.name: row.scheme for row in report.rows if row.scheme} == {"0.weight": "w8a8-static"}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(1, 97, (2, 9)), "use_cache": False, "more": [1, "a", None]}
    model = llama().bfloat16()
    model_forward = model.forward
    model.forward = lambda more, **kwargs: model_forward(**kwargs)
    stats = calibrate(model, [batch])
    assert stats.save(tmp_path / "stats.safetensors") == tmp_path / "stats.safetensors"
    loaded = Stats.load(tmp_path / "stats.safetensors")
    assert_equal_stats(stats, loaded)
    assert torch.equal(loaded.example["input_ids"], batch["input_ids"])
    assert loaded.example["more"] == [1, "a", None] and loaded.example["use_cache"] is False
    # Siblings were fed the same rows, which are written once.
    q, k = (loaded.observers[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert q.rows is k.rows


def test_a_tuple_is_loaded_as_one(tmp_path: Path) -> None:
    """A model may ask for its type, or look something up by it."""
    stats = calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.ones(1, 3)])
    stats.example = ({"sizes": (2, (3, 4)), "names": ["a", ("b",)]},)
    assert Stats.load(stats.save(tmp_path / "stats.safetensors")).example == stats.example
    stats.example = transformers.BatchEncoding({"sizes": {"of": (1, 2)}})
    assert Stats.load(stats.save(tmp_path / "stats.safetensors")).example == {"sizes": {"of": (1, 2)}}


@pytest.mark.parametrize(
    "value", [collections.namedtuple("Named", "a b")(1, 2), transformers.modeling_outputs.BaseModelOutput()], ids=str
)
def test_what_would_come_back_as_another_type_is_refused(value: Any, tmp_path: Path) -> None:
    """Which a model asks for its parts by name."""
    stats = calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.ones(1, 3)])
    for stats.example in ((value,), {"x": [value]}):
        with pytest.raises(
            CalibrateError, match=f"the first batch holds a {type(value).__name__}, which a file cannot"
        ):
            stats.save(tmp_path / "stats.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    stats = calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.ones(1, 3)])
    path = stats.save(tmp_path / "stats.safetensors")
    before = path.read_bytes()
    stats.example = {"x": object()}
    with pytest.raises(CalibrateError, match="the first batch holds a object, which a file cannot"):
        stats.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    stats.example = None
    with pytest.raises(CalibrateError, match="cannot be written"):
        stats.save(tmp_path / "nowhere" / "stats.safetensors")


def test_a_disk_that_is_full_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /dev/full says it, and safetensors."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    stats = calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.ones(1, 3)])
    module = sys.modules["octavo.calibration.stats"]
    monkeypatch.setattr(module, "save_file", refuse)
    words = rf"^{re.escape(str(tmp_path))}/file: the disk is full \(.*No space left.*\); free some space"
    with pytest.raises(CalibrateError, match=words):
        stats.save(tmp_path / "file")
    monkeypatch.setattr(module, "replacing", lambda path: contextlib.nullcontext(Path("/dev/full")))
    with pytest.raises(CalibrateError, match=words):
        stats.save_act_scales(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CalibrateError, match="cannot be read as calibration statistics"):
        Stats.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CalibrateError, match="cannot be read as calibration statistics"):
        Stats.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CalibrateError, match="holds no calibration statistics"):
        Stats.load(path)
    for about, why in (("[]", "holds no calib"), ('{"format": "octavo-stats-2"}', r"x.safetensors: is damaged .*unre")):
        save_file({"a": torch.ones(1)}, path, metadata={"octavo": about})
        with pytest.raises(CalibrateError, match=why):
            Stats.load(path)


def test_smoothquants_act_scales(tmp_path: Path) -> None:
    """Its file is a dict of name -> amax per channel, as its generate_act_scales.py writes it."""
    model, batch = llama(), torch.randint(1, 97, (2, 9))
    stats = calibrate(model, [batch])
    stats.save_act_scales(tmp_path / "act_scales.pt")
    theirs = torch.load(tmp_path / "act_scales.pt", weights_only=True)
    truth = recorded(model, [batch])
    assert set(theirs) == set(truth)
    assert all(torch.equal(theirs[name], x.abs().amax(0)) for name, x in truth.items())
    loaded = Stats.load_act_scales(tmp_path / "act_scales.pt")
    for name in truth:
        assert torch.equal(loaded.input_scale(name, torch.float32), stats.input_scale(name, torch.float32))
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    with pytest.raises(CalibrateError, match="cannot be read as a file of act_scales"):
        Stats.load_act_scales(tmp_path / "bad.pt")
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "bad.pt")
    with pytest.raises(CalibrateError, match="expected a dict of layer's name -> amax"):
        Stats.load_act_scales(tmp_path / "bad.pt")
    torch.save({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "bad.pt")
    with pytest.raises(CalibrateError, match="a: the statistics holds NaN"):
        Stats.load_act_scales(tmp_path / "bad.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_static_scale_holds_the_largest_value(dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(5, 3)
        stats = calibrate(nn.Sequential(nn.Linear(3, 3)), [x])
        scale = stats.input_scale("0", dtype)
        assert scale.dtype == torch.float32 and scale.shape == (1,)
        assert torch.equal(scale.to(dtype).float(), scale), "it is stored in the model's dtype without loss"
        exact = x.abs().max().item() / 127
        assert exact * (1 - 1e-6) <= scale.item() <= exact * (1 + 2 * torch.finfo(dtype).eps)


# -- several processes -----------------------------------------------------------------------------------------------


def test_a_first_batch_with_strides_is_saved(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(4, 6).T
    stats = Stats.load(calibrate(model, [x]).save(tmp_path / "stats.safetensors"))
    assert torch.equal(stats.example, x)
    (tmp_path / "plain").touch()
    assert (tmp_path / "stats.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_no_file_of_statistics(tmp_path: Path) -> None:
    with pytest.raises(CalibrateError, match=r"is a folder, expected the file of statistics that `octavo calibrate`"):
        Stats.load(tmp_path)
