"""`save` and `load` of any module, and what a saved folder holds. Models of transformers: tests/integrations."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import octavo
from octavo import CheckpointError, OctavoWarning, QuantizeError
from octavo.formats import COVERAGE_FILE, load_into, state_dict
from octavo.formats import save as save_plain
from octavo.fused.norms import FusedRMSNorm
from octavo.modules import DynamicQuantLinear, QuantConv, QuantModule, StaticQuantLinear
from tests.tiny_models import Net, build, llama, older_weight_norm, t5, tokens


def quantized(scheme: str = "w8a16", **options: Any) -> Net:
    model = Net().eval()
    octavo.quantize(model, scheme, **options)
    return model


def calibrated(**options: Any) -> Net:
    """With static inputs wherever a layer can have them."""
    model = Net().eval()
    stats = octavo.calibrate(model, [torch.randint(0, 50, (4, 9))])
    octavo.quantize(model, "w8a8-static", stats=stats, repair=False, **options)
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# -- any module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True], ids=["built", "meta"])
@pytest.mark.parametrize("include", [[], ["lm_head"], ["Embedding", "lm_head"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_module_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, include: list[str], meta: bool) -> None:
    model = Net().to(dtype)
    model(torch.randint(0, 50, (4, 9)))  # batch norm's statistics are no longer what a fresh model has
    octavo.quantize(model.eval(), "w8a16", include=include)
    assert octavo.save(model, tmp_path / "out") == tmp_path / "out"
    fresh = on_meta(Net) if meta else Net()
    loaded = octavo.load(tmp_path / "out", model=fresh).eval()
    assert loaded is fresh
    assert_same(loaded.state_dict(), model.state_dict())
    inputs = torch.randint(0, 50, (2, 9))
    assert torch.equal(loaded(inputs), model(inputs))
    assert octavo.coverage(loaded) == octavo.coverage(model)
    if include:
        assert loaded.lm_head.weight is loaded.embedding.weight
    else:
        assert loaded.lm_head.weight is loaded.embedding.weight
        assert isinstance(loaded.lm_head.weight, nn.Parameter) and loaded.lm_head.weight.requires_grad


@pytest.mark.parametrize("meta", [False, True], ids=["built", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "o1", "o2", "o3"])
def test_int8_inputs_come_back_bit_for_bit(tmp_path: Path, scheme: str, dtype: torch.dtype, meta: bool) -> None:
    model = Net().to(dtype).eval()
    static = octavo.Scheme(scheme).is_static
    inputs = torch.randint(0, 50, (4, 9))
    stats = octavo.calibrate(model, [inputs]) if static else None
    octavo.quantize(model, scheme, stats=stats, repair=False, include=["lm_head"])
    octavo.save(model, tmp_path / "out")
    fresh = on_meta(Net) if meta else Net()
    loaded = octavo.load(tmp_path / "out", model=fresh).eval()
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(inputs), model(inputs))
    wanted = StaticQuantLinear if static else DynamicQuantLinear
    assert type(loaded.out) is type(loaded.encoder.linear1) is wanted
    assert loaded.out.scheme.input == octavo.Scheme(scheme).input
    assert loaded.out.scheme.name == ("w8a8-static" if static else "w8a8")
    assert type(loaded.conv) is QuantConv and loaded.conv.scheme.name == "w8a16"
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"  # convolutions have float inputs


def test_of_int8_inputs_a_file_holds_plain_codes(tmp_path: Path) -> None:
    model = calibrated()
    octavo.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {name for name in stored if name.startswith("out.")} == {
        "out.weight",
        "out.weight_scale",
        "out.input_scale",
        "out.bias",
    }
    assert torch.equal(stored["out.weight"], model.out.weight)
    assert torch.equal(stored["out.input_scale"], model.out.input_scale) and stored["out.input_scale"].shape == (1,)
    assert_same(state_dict(model), stored)
    assert "conv.weight_packed" in stored


def test_layers_that_are_fed_one_tensor_carry_equal_input_scales(tmp_path: Path) -> None:
    model = build(llama)
    stats = octavo.calibrate(model, [tokens(2, 9)])
    octavo.quantize(model, "w8a8-static", stats=stats, repair=False)
    octavo.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    for siblings in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
        assert len({stored[f"model.layers.1.{name}.input_scale"].item() for name in siblings}) == 1


@pytest.mark.parametrize("meta", [False, True], ids=["built", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_come_back_under_the_names_of_the_float_ones(
    tmp_path: Path, dtype: torch.dtype, meta: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = build(llama).model.norm
            self.out = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x))

    model = Model().to(dtype).eval()
    names = {name for name in model.state_dict() if name.startswith("norm")}
    model.norm.weight.data.normal_()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {name for name in stored if name.startswith("norm")} == names == {"norm.weight"}
    loaded = octavo.load(tmp_path / "out", model=on_meta(Model) if meta else Model()).eval()
    assert type(loaded.norm) is type(model.norm) is FusedRMSNorm
    x = torch.randn(5, 32).to(dtype)
    assert torch.equal(loaded(x), model(x))


def test_a_lone_file_without_a_config_says_what_its_tensors_say(tmp_path: Path) -> None:
    for name, model in (("dynamic", quantized("w8a8")), ("static", calibrated())):
        octavo.save(model, tmp_path / name)
        inputs = torch.randint(0, 50, (2, 9))
        loaded = octavo.load(tmp_path / name / "model.safetensors", model=Net()).eval()
        assert torch.equal(loaded(inputs), model(inputs))


@pytest.mark.parametrize("make", [quantized, calibrated])
def test_why_a_scheme_is_not_what_was_asked_for_comes_back(tmp_path: Path, make: Callable[..., Net]) -> None:
    model = make("w8a8") if make is quantized else make()
    assert model.conv.note is not None and model.out.note is None
    model.out.note = "a static scale leaves 3.0 dB: a dynamic one"
    octavo.save(model, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=Net())
    notes = [{n: m.note for n, m in net.named_modules() if isinstance(m, QuantModule)} for net in (loaded, model)]
    assert notes[0] == notes[1]
    assert octavo.coverage(loaded) == octavo.coverage(model)


def test_mixed_schemes_come_back(tmp_path: Path) -> None:
    model = quantized(overrides={"encoder.linear1": octavo.Scheme.of("w8a16", group_size=4)})
    octavo.save(model, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=Net())
    assert loaded.encoder.linear1.scheme == octavo.Scheme.of("w8a16", group_size=4)
    assert_same(loaded.state_dict(), model.state_dict())


def test_a_shared_weight_is_on_disk_once(tmp_path: Path) -> None:
    octavo.save(quantized(), tmp_path / "float")
    octavo.save(quantized(include=["lm_head"]), tmp_path / "int8")
    assert {n for n in load_file(tmp_path / "float/model.safetensors") if "embedding" in n or "head" in n} == {
        "embedding.weight"
    }
    assert {n for n in load_file(tmp_path / "int8/model.safetensors") if "embedding" in n or "head" in n} == {
        "embedding.weight_packed",
        "embedding.weight_scale",
        "embedding.weight_shape",
    }


def test_of_shared_names_the_one_that_the_model_calls_its_source_is_kept() -> None:
    class HeadFirst(nn.Module):
        all_tied_weights_keys = {"head.weight": "table.weight"}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 6, bias=False)
            self.table = nn.Embedding(6, 4)
            self.head.weight = self.table.weight
            self.body = nn.Linear(4, 4)

    model = HeadFirst()
    octavo.quantize(model, "w8a16")
    assert "table.weight" in state_dict(model)
    assert "head.weight" not in state_dict(model)


@pytest.mark.filterwarnings("ignore:.*read by octavo only:octavo.OctavoWarning")
@pytest.mark.parametrize("ignore", [[], ["0"]])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("norm", [weight_norm, older_weight_norm])
def test_convolutions_under_weight_norm_come_back(
    tmp_path: Path, ignore: list[str], device: str, norm: Callable[..., nn.Module]
) -> None:
    """On disk they are codes, or the two tensors of a float one; the model built anew has the two tensors."""

    def build() -> nn.Sequential:
        return nn.Sequential(norm(nn.Conv1d(4, 8, 3)), norm(nn.ConvTranspose1d(8, 6, 4), dim=1)).eval()

    model, x = build(), torch.randn(2, 4, 9)
    octavo.quantize(model, "w8a16", ignore=ignore)
    octavo.save(model, tmp_path / "out")
    with torch.device(device):
        fresh = build()
    loaded = octavo.load(tmp_path / "out", model=fresh)
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_two_layers_that_are_one_module_and_equal_but_separate_weights(tmp_path: Path) -> None:
    def make() -> nn.Module:
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.Linear(8, 8), shared, nn.LayerNorm(8), nn.LayerNorm(8))

    model = make()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=make())
    assert loaded[0] is loaded[2]
    assert loaded[3].weight is not loaded[4].weight  # their values are equal, their storage is not
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))


class TwoTables(nn.Module):
    """An embedding and a head of the same shape, their weights one Parameter, two that share memory, or separate."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 8, bias=False)
        if tie == "parameter":
            self.head.weight = self.table.weight
        elif tie == "data":
            self.head.weight.data = self.table.weight.data

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.table(tokens)))


FLOAT_TABLES: dict[str, Any] = {"ignore": ["head"]}
INT8_TABLES: dict[str, Any] = {"include": ["Embedding", "head"]}


@pytest.mark.parametrize("meta", [False, True], ids=["built", "meta"])
@pytest.mark.parametrize("options", [FLOAT_TABLES, INT8_TABLES], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("saved", "into"), [("data", "data"), ("parameter", "data"), ("data", "parameter"), ("none", "data")]
)
def test_weights_that_share_memory_only_come_back(
    tmp_path: Path, saved: str, into: str, options: dict[str, Any], meta: bool
) -> None:
    model = TwoTables(saved)
    octavo.quantize(model, "w8a16", **options)
    octavo.save(model, tmp_path / "out")
    fresh = on_meta(lambda: TwoTables(into)) if meta else TwoTables(into)
    loaded = octavo.load(tmp_path / "out", model=fresh)
    assert torch.equal(loaded(torch.arange(8)), model(torch.arange(8)))


def test_a_buffer_that_shares_a_parameters_memory_comes_back_as_a_buffer(tmp_path: Path) -> None:
    class WithView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.register_buffer("bias_again", self.body.bias.data)

    model = WithView()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=WithView())
    assert torch.equal(loaded.get_buffer("bias_again"), model.body.bias)
    assert dict(loaded.named_parameters()).keys() == {"body.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FLOAT_TABLES, r"'(table|head)\.weight' and '(table|head)\.weight' are weights of their own, and .* ties them"),
        (INT8_TABLES, r"'(table|head)\.weight' and '(table|head)\.weight' are weights of their own, and .* ties them"),
        ({}, r"holds 'table\.weight' in float, which the model ties"),
    ],
    ids=["float", "int8", "one int8"],
)
def test_separate_weights_are_not_loaded_into_a_model_that_ties_them(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = TwoTables("none")
    octavo.quantize(model, "w8a16", **options)
    octavo.save(model, tmp_path / "out")
    fresh = TwoTables("parameter")
    before = bits(fresh)
    with pytest.raises(CheckpointError, match=message):
        octavo.load(tmp_path / "out", model=fresh)
    assert_same(bits(fresh), before)


@pytest.mark.parametrize("options", [FLOAT_TABLES, INT8_TABLES], ids=["float", "int8"])
def test_separate_but_equal_weights_become_one_where_the_model_ties_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = TwoTables("none")
    model.head.weight.data.copy_(model.table.weight.data)
    octavo.quantize(model, "w8a16", **options)
    octavo.save(model, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=TwoTables("parameter"))
    assert loaded.head.weight is loaded.table.weight
    assert torch.equal(loaded(torch.arange(8)), model(torch.arange(8)))


@pytest.mark.parametrize("options", [FLOAT_TABLES, INT8_TABLES], ids=["float", "int8"])
def test_a_tied_weight_is_not_loaded_into_a_model_that_wants_two(tmp_path: Path, options: dict[str, Any]) -> None:
    model = TwoTables("parameter")
    octavo.quantize(model, "w8a16", **({} if options is FLOAT_TABLES else options))
    octavo.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"1 tensors the checkpoint lacks, such as 'head\.weight'"):
        octavo.load(tmp_path / "out", model=TwoTables("none"))


@pytest.mark.parametrize("beside", [(), ("mask_scale",), ("mask_scale", "mask_shape")])
def test_a_buffer_that_is_called_as_packed_codes_are_is_a_buffer(tmp_path: Path, beside: tuple[str, ...]) -> None:
    def make(value: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        for name in ("mask_packed", *beside):
            model.register_buffer(name, torch.full((4, 1), value, dtype=torch.int32))
        return model

    model = make(7)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    assert_same(octavo.load(tmp_path / "out", model=make(0)).state_dict(), model.state_dict())


def test_the_model_is_not_modified_by_saving(tmp_path: Path) -> None:
    model = quantized(include=["lm_head"])
    before = bits(model)
    octavo.save(model, tmp_path / "out")
    assert_same(bits(model), before)


def test_steps_are_reported_in_both_directions(tmp_path: Path) -> None:
    saving: list[tuple[int, int]] = []
    loading: list[tuple[int, int]] = []
    octavo.save(quantized(), tmp_path / "out", progress=lambda *step: saving.append(step))
    octavo.load(tmp_path / "out", model=Net(), progress=lambda *step: loading.append(step))
    for steps in (saving, loading):
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert {total for _, total in steps} == {len(steps)}


def test_shards(tmp_path: Path) -> None:
    model = quantized()
    octavo.save(model, tmp_path / "out", max_shard_size=2000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted({*index["weight_map"].values()})
    assert len(shards) > 2
    stored: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, framework="pt") as file:
            assert {name for name, s in index["weight_map"].items() if s == shard} == set(file.keys())
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict
    assert_same(stored, state_dict(model))
    assert_same(octavo.load(tmp_path / "out", model=Net()).state_dict(), model.state_dict())


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    model = quantized()
    octavo.save(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        COVERAGE_FILE,
    ]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(config) == {"quantization_config"}
    assert config["quantization_config"]["quant_method"] == "octavo"  # no other program can build this model
    assert octavo.Coverage.from_dict(json.loads((tmp_path / "out" / COVERAGE_FILE).read_text())) == octavo.coverage(
        model
    )


def test_a_tokenizer_goes_along_with_any_model(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    tokenizer: Any = Tokenizer()
    octavo.save(quantized(), tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out/tokenizer.json").is_file()
    with pytest.raises(octavo.OctavoError, match=r"tokenizer is 'gpt2', expected .* AutoTokenizer\.from_pretrained"):
        octavo.save(quantized(), tmp_path / "other", tokenizer="gpt2")
    assert not (tmp_path / "other").exists()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"no int8 layer to save; call octavo\.quantize"):
        octavo.save(Net(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out: already exists"):
        octavo.save(quantized(), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["killed", "full"])
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | BaseException
) -> None:
    model = quantized()
    written: list[str] = []
    from octavo.formats.checkpoint import CheckpointWriter

    write = CheckpointWriter.write

    def fail_late(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) == 5:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", fail_late)
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as raised:
        octavo.save(model, tmp_path / "out")
    assert isinstance(raised.value, KeyboardInterrupt) or "the disk is full" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def with_(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def check_refused_whole(
    saved: nn.Module, edit: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    """A checkpoint of `saved` whose tensors were edited is refused, and the model to load it into is as it was."""
    octavo.save(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    model = Net()
    before, classes = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=message):
        octavo.load(folder, model=model)
    assert [type(module) for module in model.modules()] == classes
    assert_same(bits(model), before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without("norm.running_mean"),
            r"1 tensors the checkpoint lacks, such as 'norm\.running_mean'; build the model",
        ),
        (without("out.bias"), r"1 tensors the checkpoint lacks, such as 'out\.bias'"),
        (with_("new.weight", torch.zeros(2)), r"1 tensors the model lacks, such as 'new\.weight'"),
        (with_("out.bias", torch.zeros(3)), r"'out\.bias' has shape \[3\], the model's has \[16\]"),
        (without("out.weight_scale"), r"has no tensor 'out\.weight_scale'"),
        (without("out.weight_packed"), r"the model lacks, such as 'out\.weight_(scale|shape)'"),
        (with_("out.weight_packed", torch.zeros(16, 9, dtype=torch.int32)), r"out\.weight_packed: .*expected"),
        (with_("out.weight_scale", torch.full((16, 1), torch.nan)), r"out\.weight_scale: holds NaN or inf"),
        (
            with_("out.weight", torch.zeros(16, 6)),
            r"'out\.weight' \(torch\.float32\) and its int8 codes, '.*weight_packed'",
        ),
        (
            with_("out.weight", torch.zeros(16, 6, dtype=torch.int8)),
            r"'out\.weight' \(torch\.int8\) and its int8 codes",
        ),
        (with_("out.weight_shape", torch.tensor(6)), r"out\.weight_shape: is torch\.int64 \[\], expected .*dimensions"),
        (with_("out.bias", torch.zeros(16, dtype=torch.int8)), r"'out\.bias' is torch\.int8, the model's is .*float32"),
        (
            with_("out.weight_shape", torch.tensor([6, 16])),
            r"'out\.weight' has shape \[6, 16\], the model's .*\[16, 6\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    check_refused_whole(quantized(), edit, message, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("out.weight"), r"the model lacks, such as 'out\.(weight_scale|input_scale)'"),
        (without("out.weight_scale"), r"has no tensor 'out\.weight_scale'"),
        (without("out.input_scale"), r"'out\.input_scale' is missing, and the config says .* are static"),
        (with_("out.input_scale", torch.zeros(1)), r"out\.input_scale: is 0\.0, expected a positive scale"),
        (with_("out.input_scale", torch.ones(2)), r"out\.input_scale: is torch\.float32 \[2\], expected .*\[1\]"),
        (with_("out.input_zero_point", torch.zeros(1, dtype=torch.int8)), r"'out\.input_zero_point' means asymmetric"),
        (with_("out.weight_zero_point", torch.zeros(16, 1, dtype=torch.int8)), r"out\.weight_zero_point: means asymm"),
        (with_("out.weight", torch.zeros(16, 9, dtype=torch.int8)), r"'out\.weight' has shape \[16, 9\], the model's"),
        (with_("out.weight", torch.zeros(16, 6)), r"the model lacks, such as 'out\.(weight|input_scale|weight_scale)'"),
        (with_("out.weight_scale", torch.ones(16, 2)), r"out\.weight_scale has shape \[16, 2\], for weights in groups"),
        (with_("out.weight_scale", torch.full((16, 1), torch.inf)), r"out\.weight_scale: holds NaN or inf"),
    ],
)
def test_a_damaged_layer_with_int8_inputs_leaves_the_model_as_it_was(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    check_refused_whole(calibrated(), edit, message, tmp_path / "out")


def test_an_input_scale_under_dynamic_inputs_is_refused(tmp_path: Path) -> None:
    octavo.save(quantized("w8a8"), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file({**tensors, "out.input_scale": torch.ones(1)}, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=r"'out\.input_scale' is there, and the config says .* not static"):
        octavo.load(tmp_path / "out", model=Net())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Net(hidden=32), r"has shape .*, the model's .*; build the model that it was saved from"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3)),
            r"int8 codes for 'conv\.weight', and the model has no such layer; build",
        ),
        (quantized, r"the model holds int8 layers already; build it anew, as a float model"),
    ],
    ids=["wider", "another", "int8"],
)
def test_a_model_of_another_structure_is_refused(tmp_path: Path, model: Callable[[], nn.Module], message: str) -> None:
    octavo.save(quantized(), tmp_path / "out")
    made = model()
    before = bits(made)
    with pytest.raises(CheckpointError, match=message):
        octavo.load(tmp_path / "out", model=made)
    assert_same(bits(made), before)


def test_a_buffer_that_no_file_holds_needs_a_built_model(tmp_path: Path) -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(4.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table

    model = WithTable()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    x = torch.randn(2, 4)
    assert torch.equal(octavo.load(tmp_path / "out", model=WithTable())(x), model(x))
    with pytest.raises(CheckpointError, match=r"does not hold table .*buffers that are not saved.*not on meta"):
        octavo.load(tmp_path / "out", model=on_meta(WithTable))


def test_a_damaged_coverage_file_is_named_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    octavo.save(quantized(), tmp_path / "out")
    (tmp_path / "out" / COVERAGE_FILE).write_text("{")
    model = Net()
    before = bits(model)
    with pytest.raises(CheckpointError, match=rf"{COVERAGE_FILE}: cannot be read"):
        load_into(tmp_path / "out", model)
    assert_same(bits(model), before)
    (tmp_path / "out" / COVERAGE_FILE).unlink()
    load_into(tmp_path / "out", model)


def test_a_coverage_of_other_weights_is_left_out(tmp_path: Path) -> None:
    for name, model in (("out", quantized()), ("other", quantized(ignore=["out"]))):
        octavo.save(model, tmp_path / name)
    shutil.copy(tmp_path / "other" / COVERAGE_FILE, tmp_path / "out")
    reasons = {
        name: {row.reason for row in octavo.coverage(octavo.load(tmp_path / name, model=Net())).rows}
        for name in ("out", "other")
    }
    assert "ignored by 'out'" in reasons["other"] and "ignored by 'out'" not in reasons["out"]


# -- transformers models: what is written ------------------------------------------------------------------------------


def test_config_says_how_it_is_quantized_and_in_which_dtype(tmp_path: Path) -> None:
    model = build(llama, torch.bfloat16)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]


@pytest.mark.filterwarnings("ignore:int8 layers of kind Embedding:octavo.OctavoWarning")
@pytest.mark.parametrize(("weights", "norms"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_dtype_of_a_model_whose_weights_are_all_int8(
    tmp_path: Path, weights: torch.dtype, norms: torch.dtype
) -> None:
    """Norms in fp32 do not make a model of bf16 one of fp32; a model that was cast to bf16 later is one of bf16."""
    model = build(llama, weights)
    octavo.quantize(model, "w8a16", include=["Embedding", "lm_head"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(norms)
    octavo.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("make", "tied"), [(llama, False), (t5, True)])
def test_a_head_that_was_untied_is_said_to_be(tmp_path: Path, make: Callable[[], Any], tied: bool) -> None:
    """But of an encoder-decoder, which may scale by what its config says: T5's relatives do."""
    model = build(make)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is tied


def test_a_generation_config_is_written_as_it_is(tmp_path: Path) -> None:
    """transformers loads settings that contradict each other, as Vicuna's, and refuses to save them."""
    model = build(llama)
    octavo.quantize(model, "w8a16")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    octavo.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written["temperature"] == 0.5
    assert octavo.load(tmp_path / "out").generation_config.temperature == 0.5


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"include": ["Embedding"]}, "include no embedding, nor a head that shares its weight"),
        ({"include": ["lm_head"]}, "include no embedding, nor a head that shares its weight"),
    ],
)
def test_the_advice_for_a_checkpoint_that_others_load_is_one_that_works(
    tmp_path: Path, options: dict[str, Any], advice: str
) -> None:
    model = build(llama, tie_word_embeddings=True)
    octavo.quantize(model, "w8a16", **options)
    with pytest.warns(OctavoWarning, match=advice) as caught:
        octavo.save(model, tmp_path / "out")
    assert caught[0].filename == __file__
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "octavo"


def test_for_convolutions_the_advice_is_to_ignore_them(tmp_path: Path) -> None:
    from tests.tiny_models import whisper

    model = build(whisper)
    octavo.quantize(model, "w8a16", include=["Embedding"])
    with pytest.warns(OctavoWarning, match=r"with ignore=\['Conv1d'\] and include no embedding"):
        octavo.save(model, tmp_path / "with")
    model = build(whisper)
    octavo.quantize(model, "w8a16", ignore=["Conv1d"])
    octavo.save(model, tmp_path / "without")  # a warning would be an error here


def companions(folder: Path) -> dict[str, str]:
    generation = '{"do_sample": true, "top_k": 7}'
    files = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "generation_config.json": generation}
    for name, content in files.items():
        (folder / name).write_text(content)
    return files


def test_the_files_beside_the_models_own_checkpoint_come_along(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    build(llama).save_pretrained(tmp_path / "float")
    files = companions(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    for name in files:
        assert (tmp_path / "out" / name).is_file(), name
    assert (tmp_path / "out/chat_template.jinja").read_text() == files["chat_template.jinja"]
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["top_k"] == 7
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_a_tokenizer_that_was_given_is_saved_instead(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    tokenizer.chat_template = "{{ messages }}"
    build(llama).save_pretrained(tmp_path / "float")
    companions(tmp_path / "float")
    for name in ("modeling_own.py", "preprocessor_config.json", "added_tokens.json"):
        (tmp_path / "float" / name).write_text("{}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out/modeling_own.py").exists() and (tmp_path / "out/preprocessor_config.json").exists()
    assert not (tmp_path / "out/added_tokens.json").exists()  # another tokenizer's
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.get_vocab() == {"a": 0, "b": 1, "?": 2}
    assert back.chat_template == "{{ messages }}"


def test_a_transformers_model_is_also_loaded_as_any_module(tmp_path: Path) -> None:
    model = build(llama, torch.bfloat16)
    fresh = copy.deepcopy(model)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    ids = tokens()
    assert torch.equal(octavo.load(tmp_path / "out", model=fresh)(ids).logits, model(ids).logits)


def test_formats_alone_save_what_octavo_saves_for_a_plain_module(tmp_path: Path) -> None:
    model = quantized()
    octavo.save(model, tmp_path / "a")
    save_plain(model, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    shutil.rmtree(tmp_path / "a")


def test_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    model.add_module("counting", Counting(2, 2))
    octavo.quantize(model, "w8a16", ignore=["counting"])
    with pytest.raises(CheckpointError, match=r"counting\._extra_state: is a dict in the model's state_dict"):
        octavo.save(model, tmp_path / "int8")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_dense_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("graph", torch.eye(4).to_sparse())
    octavo.quantize(model, "w8a16")
    with pytest.raises(CheckpointError, match=r"^graph: is of layout torch\.sparse_coo, expected a dense tensor"):
        octavo.save(model, tmp_path / "int8")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_of_a_wrapped_model_the_model_is_saved(tmp_path: Path, wrap: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    octavo.quantize(model, "w8a16")
    octavo.save(wrap(model), tmp_path / "int8")
    assert torch.equal(octavo.load(tmp_path / "int8", model=nn.Sequential(nn.Linear(8, 8)))(x), model(x))
    wrapped = wrap(nn.Sequential(nn.Linear(8, 8)))
    assert octavo.load(tmp_path / "int8", model=wrapped) is wrapped
    assert torch.equal(wrapped(x), model(x))


def test_a_buffer_that_is_nowhere_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("table", torch.ones(8), persistent=False)

    model = Net()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "int8")
    with torch.device("meta"):
        skeleton = Net()
    with pytest.raises(CheckpointError, match=r"does not hold table \(1 such: buffers that are not saved\)"):
        octavo.load(tmp_path / "int8", model=skeleton)
    assert type(skeleton.layer) is nn.Linear
