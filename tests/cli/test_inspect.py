"""`octavo inspect` tells what lies in the files, held against safetensors' own reading of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.formats import COVERAGE_FILE

Run = Callable[..., Any]


@pytest.fixture
def foreign(tiny_int8: Path, tmp_path: Path) -> Path:
    """The int8 checkpoint as another tool would have written it: without octavo's coverage. A copy to be changed."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_int8, folder)
    (folder / COVERAGE_FILE).unlink()
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_dtypes_and_bytes_are_those_of_the_files(run: Run, tiny_int8: Path) -> None:
    tensors = load_file(tiny_int8 / "model.safetensors")
    data = run("inspect", tiny_int8, "--json").data
    assert data["kind"] == "int8" and data["problem"] is None
    assert (data["quant_method"], data["format"]) == ("compressed-tensors", "pack-quantized")
    assert data["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    for row in data["dtypes"]:
        of_dtype = [t for t in tensors.values() if t.dtype == getattr(torch, row["dtype"])]
        assert (row["tensors"], row["bytes"]) == (len(of_dtype), sum(t.nbytes for t in of_dtype))
    assert sum(row["tensors"] for row in data["dtypes"]) == len(tensors)


def test_the_coverage_is_the_one_that_octavo_left(run: Run, tiny_int8: Path) -> None:
    left = json.loads((tiny_int8 / COVERAGE_FILE).read_text())
    shown = run("inspect", tiny_int8, "--json").data["coverage"]
    assert {**shown, "weights": left["weights"]} == left  # and which weights it is of, for octavo itself
    assert run("inspect", tiny_int8 / "model.safetensors", "--json").data["coverage"] == shown


def test_a_coverage_that_is_not_of_the_weights_beside_it_is_left_out(run: Run, tiny_int8: Path, foreign: Path) -> None:
    inferred = run("inspect", foreign, "--json").data["coverage"]
    shutil.copy(tiny_int8 / COVERAGE_FILE, foreign)
    tensors = load_file(foreign / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    rows = tensors.pop(f"{name}_shape"), tensors.pop(f"{name}_scale"), tensors.pop(f"{name}_packed")
    save_file({**tensors, name: torch.zeros(*rows[0].tolist(), dtype=torch.bfloat16)}, foreign / "model.safetensors")
    shown = run("inspect", foreign, "--json")
    assert COVERAGE_FILE in shown.err and "other weights" in shown.err
    fates = {row["name"]: row["scheme"] for row in shown.data["coverage"]["rows"]}
    assert fates == {row["name"]: row["scheme"] if row["name"] != name else None for row in inferred["rows"]}
    # Of one file no one said that the coverage is: no warning.
    alone = run("inspect", foreign / "model.safetensors", "--json")
    assert alone.err == "" and {row["name"]: row["scheme"] for row in alone.data["coverage"]["rows"]} == fates


def test_without_it_bytes_schemes_and_reasons_are_inferred(run: Run, tiny_int8: Path, foreign: Path) -> None:
    left = {row["name"]: row for row in json.loads((tiny_int8 / COVERAGE_FILE).read_text())["rows"]}
    inferred = {row["name"]: row for row in run("inspect", foreign, "--json").data["coverage"]["rows"]}
    assert inferred.keys() == left.keys()
    for name, row in inferred.items():
        for key in ("shape", "bytes_before", "bytes_after", "scheme"):
            assert row[key] == left[name][key], (name, key)
    assert inferred["model.norm.weight"]["reason"] == "1-D: biases and norms stay float"
    assert inferred["model.embed_tokens.weight"]["reason"] == "not among the config's targets (Linear)"


def test_what_the_config_ignores_is_said(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", tiny, out, "--ignore", "re:.*q_proj").code == 0
    (out / COVERAGE_FILE).unlink()
    change_config(out, ignore=["lm_head", "re:.*self_attn\\.q_proj"])
    rows = {row["name"]: row for row in run("inspect", out, "--json").data["coverage"]["rows"]}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert rows[name]["reason"] == "the config ignores 're:.*self_attn\\\\.q_proj'" and rows[name]["scheme"] is None


def test_layers_are_in_their_natural_order(run: Run, foreign: Path) -> None:
    tensors = load_file(foreign / "model.safetensors")
    tensors = {re.sub(r"layers\.1\.", "layers.10.", name): tensor for name, tensor in tensors.items()}
    tensors["model.layers.2.norm.weight"] = torch.ones(3)
    save_file(tensors, foreign / "model.safetensors", {"format": "pt"})
    names = [row["name"] for row in run("inspect", foreign, "--json").data["coverage"]["rows"]]
    layers = [int(found.group(1)) for name in names if (found := re.search(r"layers\.(\d+)", name))]
    assert layers == sorted(layers) and set(layers) == {0, 2, 10}


def test_scales_are_those_of_the_files(run: Run, tiny_int8: Path) -> None:
    tensors = load_file(tiny_int8 / "model.safetensors")
    scales = run("inspect", tiny_int8, "--json").data["scales"]
    assert {scale["family"] for scale in scales} == {
        re.sub(r"\d+", "*", name.removesuffix("_scale")) for name in tensors if name.endswith("_scale")
    }
    (down,) = (scale for scale in scales if "down_proj" in scale["family"])
    expected = torch.cat([t.double().flatten() for n, t in tensors.items() if n.endswith("down_proj.weight_scale")])
    assert (down["tensors"], down["count"], down["dtype"]) == (2, len(expected), "bfloat16")
    assert down["minimum"] == expected.min().item() and down["maximum"] == expected.max().item()
    assert down["median"] == expected.median().item()
    assert not any(down[key] for key in ("zero", "subnormal", "negative", "not_finite", "ones"))


def test_odd_scales_are_flagged(run: Run, foreign: Path) -> None:
    tensors = load_file(foreign / "model.safetensors")
    scale = tensors["model.layers.1.mlp.down_proj.weight_scale"]
    scale[:6, 0] = torch.tensor([0.0, 1e-39, -1.0, float("nan"), float("inf"), 1.0])
    save_file(tensors, foreign / "model.safetensors", {"format": "pt"})
    (down,) = (s for s in run("inspect", foreign, "--json").data["scales"] if "down_proj" in s["family"])
    found = [down[key] for key in ("zero", "subnormal", "negative", "not_finite", "ones")]
    assert found == [1, 1, 1, 2, 1]
    shown = run("inspect", foreign).out
    assert "1 zero, 1 subnormal, 1 negative, 2 NaN or inf, 1 exactly 1 (rows of zeros)" in shown


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_scales_of_a_dtype_that_scales_do_not_have_are_shown(dtype: torch.dtype, run: Run, foreign: Path) -> None:
    tensors = load_file(foreign / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = (tensors[name].float() * 2**10).to(dtype)
    save_file(tensors, foreign / "model.safetensors", {"format": "pt"})
    shown = run("inspect", foreign, "--json").data["scales"]
    found = {s["dtype"]: s for s in shown if "down_proj" in s["family"]}
    assert found.keys() == {"bfloat16", str(dtype).removeprefix("torch.")}
    assert found[str(dtype).removeprefix("torch.")]["maximum"] == tensors[name].double().max().item()


def test_people_see_it_all(run: Run, tiny_int8: Path) -> None:
    shown = run("inspect", tiny_int8)
    assert shown.code == 0 and shown.err == ""
    assert f"{tiny_int8}: an int8 checkpoint" in shown.out
    for title in ("Tensors on disk", "Schemes", "Coverage", "Scales"):
        assert f"\n{title}\n" in shown.out


def test_a_float_checkpoint_is_said_to_be_one(run: Run, tiny: Path) -> None:
    shown = run("inspect", tiny)
    assert shown.code == 0 and "a float checkpoint" in shown.out and f"octavo quantize {tiny} OUT" in shown.out
    data = run("inspect", tiny, "--json").data
    assert data["kind"] == "float" and data["coverage"] is None and data["scales"] == [] and data["schemes"] == []
    # One .safetensors file is a checkpoint too.
    assert run("inspect", tiny / "model.safetensors", "--json").data["bytes"] == data["bytes"]


def test_a_checkpoint_that_octavo_cannot_run_is_shown_as_far_as_it_goes(run: Run, foreign: Path) -> None:
    change_config(foreign, quant_method="gptq")
    shown = run("inspect", foreign)
    assert shown.code == 0 and "not in a way that octavo can run" in shown.out and "'gptq'" in shown.out
    data = run("inspect", foreign, "--json").data
    assert data["kind"] == "unreadable" and "'gptq'" in data["problem"] and data["dtypes"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_a_byte_are_not_called_float(dtype: torch.dtype, run: Run, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 4).to(dtype), "a.scale": torch.ones(4), "b.weight": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    shown = run("inspect", tmp_path)
    assert shown.code == 0 and "a float checkpoint" not in shown.out and "To make it int8" not in shown.out
    assert f"a.weight is {str(dtype).removeprefix('torch.')}, one of 1 weights" in shown.out
    assert run("inspect", tmp_path, "--json").data["kind"] == "unreadable"


def test_a_layout_that_nothing_says_is_not_called_none(run: Run, tiny_int8: Path) -> None:
    shown = run("inspect", tiny_int8 / "model.safetensors")
    assert "an int8 checkpoint" in shown.out and "None" not in shown.out.splitlines()[0]
    assert "pack-quantized layout, quant_method compressed-tensors." in run("inspect", tiny_int8).out


def suggested(out: str) -> list[str]:
    """The arguments of the command that is printed last."""
    return shlex.split(out.splitlines()[-1].partition("octavo ")[2])


def test_the_command_that_it_suggests_works(run: Run, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "it's a name"
    shutil.copytree(tiny, folder)
    monkeypatch.chdir(tmp_path)
    for path in (folder, folder / "model.safetensors"):
        command = suggested(run("inspect", path).out)
        assert command[:2] == ["quantize", str(folder)]
        assert run(*command).code == 0
        shutil.rmtree(tmp_path / "OUT")


def test_no_command_is_suggested_where_none_works(run: Run, tiny: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "model.safetensors", tmp_path / "other.safetensors"):
        shutil.copy(tiny / "model.safetensors", file)
        shown = run("inspect", file).out
        assert "octavo quantize" not in shown and f"octavo.quantize_checkpoint('{file}', " in shown
    shutil.copy(tiny / "config.json", tmp_path)
    assert "octavo quantize " not in run("inspect", tmp_path / "other.safetensors").out


def test_what_the_config_lacks_or_brings_is_not_suggested_to_the_command(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for change, argument, words in (
        ({"architectures": None}, "model=model", "architectures is None, expected the model's class"),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}},
            "trust_remote_code=True",
            "in code that comes with the checkpoint, which is run only for who trusts it; in Python",
        ),
    ):
        config = json.loads((tiny / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        shown = run("inspect", folder).out
        assert "octavo quantize " not in shown
        assert f"octavo.quantize_checkpoint('{folder}', 'OUT', 'w8a16', {argument})" in shown
        refused = run("quantize", folder, tmp_path / "out")
        assert refused.code == 1 and words in refused.err and "did not expect" not in refused.err
    # Code beside a model that transformers has is not needed.
    config = json.loads((tiny / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "mine.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert suggested(run("inspect", folder).out) == ["quantize", str(folder), "OUT"]
    assert run("quantize", folder, tmp_path / "out").code == 0


def test_damage_is_an_error(run: Run, foreign: Path) -> None:
    (foreign / COVERAGE_FILE).write_text('{"rows": [{"name": 1}]}')
    shown = run("inspect", foreign)
    assert shown.code == 1 and COVERAGE_FILE in shown.err and shown.out == ""
    with (foreign / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    shown = run("inspect", foreign)
    assert shown.code == 1 and "model.safetensors" in shown.err


def test_of_adapters_it_is_said_what_comes_first(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    shutil.copy(tiny / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    shown = run("inspect", folder).out
    assert "To make it int8, merge the adapters of PEFT" in shown and "quantize_checkpoint" not in shown
    assert "holds adapters of PEFT; in Python, merge them" in run("quantize", folder, tmp_path / "out").err
