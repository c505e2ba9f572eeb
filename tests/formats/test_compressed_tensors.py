"""Both int8 layouts, against the compressed-tensors package and transformers themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.formats.checkpoint import CheckpointReader, CheckpointWriter
from octavo.formats.compressed_tensors import (
    as_stored,
    check_readable,
    decode,
    decode_input_scale,
    encode,
    inputs_of,
    pack,
    quantization_config,
    stored_layout,
    unpack,
)
from octavo.primitives import choose_scale, dequantize, quantize_weight
from octavo.recipe import PRESETS, InputArgs, Scheme

CHANNEL = Scheme.of("w8a16")
GROUP_32 = Scheme.of("w8a16", group_size=32)
W8A8 = Scheme("w8a8")
STATIC = Scheme("w8a8-static")


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


# -- packing ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 70))
def test_pack_and_unpack_are_those_of_the_package(n: int, k: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(n, k)
    theirs = helpers.pack_to_int32(codes, 8)
    ours = pack(codes)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(unpack(theirs, (n, k)), helpers.unpack_from_int32(theirs, 8, torch.Size((n, k))))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_codes_of_any_shape_come_back(shape: list[int]) -> None:
    codes = random_codes(*shape)
    back = unpack(pack(codes), shape)
    assert back.dtype == torch.int8 and back.is_contiguous() and torch.equal(back, codes)


def test_a_word_holds_its_codes_lowest_bits_first_and_zeros_past_the_row() -> None:
    codes = torch.tensor([[-128, -1, 0, 127, 1, 2]], dtype=torch.int8)
    words = [0 | 127 << 8 | 128 << 16 | 255 << 24, 129 | 130 << 8]
    assert [word % 2**32 for word in pack(codes)[0].tolist()] == words


def test_codes_of_any_strides_are_packed_and_left_alone() -> None:
    codes = random_codes(6, 4, 8)
    for view in (codes.transpose(0, 2), codes[::2, 1:3, ::3]):
        before = view.clone()
        assert torch.equal(pack(view), pack(view.contiguous()))
        assert torch.equal(view, before)


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), (2, 9)),
        (torch.zeros(2, 2, dtype=torch.int32), (3, 8)),
        (torch.zeros(2, 2, dtype=torch.int64), (2, 8)),
        (torch.zeros(2, 8, dtype=torch.int32), (2, 2, 8)),
        (torch.zeros(4, dtype=torch.int32), (4, 4)),
        (torch.zeros(2, 2, dtype=torch.int32), ()),
        (torch.zeros(2, 2, dtype=torch.int32), (-2, -8)),
    ],
)
def test_packed_codes_of_another_shape_are_refused_by_name(packed: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"mlp\.weight_packed: "):
        unpack(packed, shape, name="mlp.weight_packed")


# -- one weight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((6, 70), None), ((6, 96), 32), ((8, 3, 3, 3), None), ((5, 1, 7), None)]
)
def test_a_weight_comes_back_bit_for_bit_and_as_planned(
    shape: tuple[int, ...], group_size: int | None, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    codes, scale = quantize_weight(weight, "per_group" if group_size else "per_channel", group_size=group_size)
    tensors = encode("in_proj_weight", codes, scale, dtype, CHANNEL)
    layout = stored_layout("in_proj_weight", shape, tuple(scale.shape), dtype, CHANNEL)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == layout
    assert list(layout) == ["in_proj_weight_packed", "in_proj_weight_scale", "in_proj_weight_shape"]

    codes_back, scale_back, dtype_back = decode("in_proj_weight", {**tensors, "unrelated": torch.zeros(1)})
    assert torch.equal(codes_back, codes)
    assert scale_back.dtype == torch.float32 and torch.equal(scale_back, scale)
    assert dtype_back == dtype


@pytest.mark.parametrize("group_size", [None, 32])
def test_the_package_decompresses_our_weight_to_codes_times_scale(group_size: int | None) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = quantization_config({"m": ("Linear", GROUP_32 if group_size else CHANNEL)}, [], ecosystem=True)
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    weight = torch.randn(8, 96).bfloat16()
    codes, scale = quantize_weight(weight, "per_group" if group_size else "per_channel", group_size=group_size)
    tensors = encode("weight", codes, scale, torch.bfloat16, CHANNEL)
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    theirs = compressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(theirs, dequantize(codes, scale, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [W8A8, STATIC], ids=str)
def test_under_int8_inputs_the_codes_lie_as_they_are(scheme: Scheme, dtype: torch.dtype) -> None:
    codes, scale = quantize_weight(torch.randn(6, 70).to(dtype))
    input_scale = torch.tensor([0.0625])
    tensors = encode("m.weight", codes, scale, dtype, scheme, input_scale if scheme.is_static else None)
    expected = {"m.weight": codes, "m.weight_scale": scale.to(dtype)}
    if scheme.is_static:
        expected["m.input_scale"] = input_scale.to(dtype)
        assert tensors["m.input_scale"].data_ptr() != input_scale.data_ptr()  # siblings hold one, a file holds several
    assert tensors.keys() == expected.keys()
    assert all(t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in tensors.items())
    layout = stored_layout("m.weight", (6, 70), (6, 1), dtype, scheme)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == layout

    codes_back, scale_back, dtype_back = decode("m.weight", tensors)
    assert torch.equal(codes_back, codes) and torch.equal(scale_back, scale)
    assert (scale_back.dtype, dtype_back) == (torch.float32, dtype)


def test_the_package_decompresses_a_plain_weight_to_codes_times_scale() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = quantization_config({"m": ("Linear", W8A8)}, [], ecosystem=True)
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    codes, scale = quantize_weight(torch.randn(8, 50).bfloat16())
    tensors = encode("weight", codes, scale, torch.bfloat16, W8A8)
    theirs = BaseCompressor.load_from_registry("int-quantized").decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, dequantize(codes, scale, torch.bfloat16))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_stored_scale_is_that_of_every_row(shape: tuple[int, ...], packed: bool) -> None:
    codes = random_codes(4, 8)
    scale = torch.full(shape, 0.5, dtype=torch.bfloat16)
    stored = encode("m.weight", codes, torch.ones(4, 1), torch.bfloat16, CHANNEL if packed else W8A8)
    codes_back, scale_back, dtype = decode("m.weight", {**stored, "m.weight_scale": scale})
    assert torch.equal(codes_back, codes) and dtype == torch.bfloat16
    assert scale_back.is_contiguous() and torch.equal(scale_back, torch.full((4, 1), 0.5))


@pytest.mark.parametrize("stored", [torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25]).bfloat16()])
def test_an_input_scale_is_read(stored: Tensor) -> None:
    scale = decode_input_scale(stored, "m.input_scale")
    assert scale.dtype == torch.float32 and torch.equal(scale, torch.tensor([0.25]))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.ones(2), r"is torch\.float32 \[2\], expected floating point \[1\]"),
        (torch.ones(1, 1), r"is torch\.float32 \[1, 1\]"),
        (torch.ones(1, dtype=torch.int32), r"is torch\.int32 \[1\]"),
        (torch.ones(1).to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn \[1\], expected .* of 16 bits or more"),
        (torch.zeros(1), r"is 0\.0, expected a positive scale"),
        (torch.tensor([-1.0]), r"is -1\.0"),
        (torch.tensor([torch.nan]), r"is nan"),
        (torch.tensor([torch.inf]), r"holds NaN or inf"),
    ],
)
def test_an_input_scale_that_is_none_is_refused(stored: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^m\.input_scale: {message}"):
        decode_input_scale(stored, "m.input_scale")


def test_a_scale_that_its_dtype_cannot_hold_is_refused() -> None:
    scale = torch.full((2, 1), 1 / 3)
    with pytest.raises(CheckpointError, match=r"mlp\.weight_scale: has values that torch.bfloat16 cannot hold"):
        encode("mlp.weight", random_codes(2, 4), scale, torch.bfloat16, CHANNEL)
    assert torch.equal(
        encode("mlp.weight", random_codes(2, 4), scale, torch.float32, CHANNEL)["mlp.weight_scale"], scale
    )


def test_an_input_scale_that_its_dtype_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"mlp\.input_scale: has values that torch.bfloat16 cannot hold"):
        encode("mlp.weight", random_codes(2, 4), torch.ones(2, 1), torch.bfloat16, STATIC, torch.tensor([1 / 3]))


def set_to(suffix: str, value: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"a.weight_{suffix}": torch.as_tensor(value)})


def check_refused(scheme: Scheme, damage: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """A weight of that scheme is decoded as it was encoded, and refused once it is damaged."""
    tensors = encode("a.weight", random_codes(4, 8), torch.ones(4, 1), torch.float32, scheme)
    decode("a.weight", tensors)
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        decode("a.weight", tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("a.weight_packed"), r"a\.weight_packed: is missing"),
        (lambda tensors: tensors.pop("a.weight_scale"), r"a\.weight_scale: is missing"),
        (lambda tensors: tensors.pop("a.weight_shape"), r"a\.weight_shape: is missing"),
        (set_to("zero_point", [[0]]), r"a\.weight_zero_point: means asymmetric"),
        (set_to("g_idx", [0]), r"a\.weight_g_idx: means groups in activation order"),
        (
            set_to("packed", torch.zeros(4, 1, dtype=torch.int32)),
            r"a\.weight_packed: .*\[4, 1\], expected .*\[4, 2\]",
        ),
        (set_to("shape", [4, 9]), r"a\.weight_packed: .*\[4, 3\] for a weight of shape \[4, 9\]"),
        (set_to("shape", [[4, 8]]), r"a\.weight_shape: is torch.int64 \[1, 2\]"),
        (set_to("shape", [4.0, 8.0]), r"a\.weight_shape: is torch.float32"),
        (set_to("scale", torch.ones(4)), r"a\.weight_scale: is torch.float32 \[4\], expected .*\[4, 1\]"),
        (set_to("scale", torch.ones(8, 1)), r"a\.weight_scale: is torch.float32 \[8, 1\]"),
        (set_to("scale", torch.ones(4, 3)), r"a\.weight_scale: is torch.float32 \[4, 3\].*divide the 8 columns"),
        (set_to("scale", torch.ones(4, 0)), r"a\.weight_scale: is torch.float32 \[4, 0\]"),
        (set_to("scale", torch.ones(4, 1, dtype=torch.int32)), r"a\.weight_scale: is torch.int32"),
        (set_to("scale", torch.ones(4, 1).to(torch.float8_e5m2)), r"a\.weight_scale: is torch.float8_e5m2.*of 16 bits"),
        (set_to("scale", torch.full((4, 1), torch.nan)), r"a\.weight_scale: holds NaN or inf"),
    ],
)
def test_a_damaged_weight_is_refused_by_the_tensors_name(
    damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    check_refused(CHANNEL, damage, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("a.weight"), r"a\.weight_packed: is missing"),
        (set_to("scale", torch.ones(3, 1)), r"a\.weight_scale: is torch.float32 \[3, 1\], expected .*\[4, 1\]"),
        (set_to("scale", torch.full((4, 1), torch.inf)), r"a\.weight_scale: holds NaN or inf"),
        (set_to("zero_point", [[0]]), r"a\.weight_zero_point: means asymmetric"),
        (lambda tensors: tensors.update({"a.weight": random_codes()}), r"a\.weight: is a single int8 code"),
        (lambda tensors: tensors.pop("a.weight_scale"), r"a\.weight_scale: is missing"),
    ],
)
def test_a_damaged_plain_weight_is_refused_by_the_tensors_name(
    damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    check_refused(W8A8, damage, message)


# -- quantization_config ----------------------------------------------------------------------------------------------


def test_one_scheme_is_one_group_by_class() -> None:
    layers = {"embed": ("Embedding", CHANNEL), "a": ("Linear", CHANNEL), "b": ("Linear", CHANNEL)}
    assert quantization_config(layers, ["lm_head"], ecosystem=True) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Embedding", "Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "group_size": None,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def test_several_schemes_are_groups_of_exact_names() -> None:
    layers = {"a": ("Linear", CHANNEL), "b": ("Linear", GROUP_32), "c": ("Linear", CHANNEL)}
    groups = quantization_config(layers, [], ecosystem=True)["config_groups"]
    assert {name: group["targets"] for name, group in groups.items()} == {"group_0": ["a", "c"], "group_1": ["b"]}
    assert [group["weights"]["strategy"] for group in groups.values()] == ["channel", "group"]
    assert [group["weights"]["group_size"] for group in groups.values()] == [None, 32]


INPUTS = {
    "w8a8": {"strategy": "token", "dynamic": True},
    "w8a8-static": {"strategy": "tensor", "dynamic": False},
    "o1": {"strategy": "token", "dynamic": True},
    "o2": {"strategy": "tensor", "dynamic": True},
    "o3": {"strategy": "tensor", "dynamic": False},
}


@pytest.mark.parametrize("name", INPUTS)
def test_int8_inputs_are_said_in_the_config(name: str) -> None:
    config = quantization_config({"a": ("Linear", Scheme(name))}, [], ecosystem=True)
    (group,) = config["config_groups"].values()
    assert config["format"] == "int-quantized" and "format" not in group
    assert group["weights"]["strategy"] == "channel"  # one scale for all is written as that of every row
    args = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, **INPUTS[name]}
    assert group["input_activations"] == args
    check_readable(config, "config.json")
    assert inputs_of(config, ["a"], ["Linear"]) == Scheme(name).input


def test_schemes_that_lie_alike_are_one_group() -> None:
    layers = {"a": ("Linear", Scheme("o1")), "b": ("Linear", W8A8)}
    assert list(quantization_config(layers, [], ecosystem=True)["config_groups"]) == ["group_0"]
    assert {str(as_stored(Scheme(name))) for name in PRESETS} == {
        "w8a16",
        "w8a8",
        "w8a8-static",
        "w8a8 input per_tensor dynamic",
    }


def test_a_model_with_both_layouts_is_mixed_precision() -> None:
    layers = {"a": ("Linear", W8A8), "b": ("Linear", CHANNEL), "c": ("Linear", STATIC)}
    config = quantization_config(layers, [], ecosystem=True)
    assert config["format"] == "mixed-precision"
    assert [(group["targets"], group["format"]) for group in config["config_groups"].values()] == [
        (["a"], "int-quantized"),
        (["b"], "pack-quantized"),
        (["c"], "int-quantized"),
    ]
    check_readable(config, "config.json")
    assert [inputs_of(config, [name], ["Linear"]) for name in "abc"] == [s.input for _, s in layers.values()]
    with pytest.raises(CheckpointError, match="no group of config_groups targets 'd'"):
        inputs_of(config, ["d"], ["Linear"])


@pytest.mark.parametrize("name", ["up", "down", "deep.up", "other"])
def test_a_layer_has_the_group_that_the_package_gives_it(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    static = quantization_config({"a": ("Linear", STATIC)}, [], ecosystem=True)["config_groups"]["group_0"]
    token = quantization_config({"a": ("Linear", W8A8)}, [], ecosystem=True)["config_groups"]["group_0"]
    plain = {**token, "input_activations": None}
    groups = {
        "group_0": {**token, "targets": ["Linear"]},
        "group_1": {**static, "targets": ["re:.*up"]},
        "group_2": {**plain, "targets": ["up"]},
    }
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups, "ignore": []}
    net = torch.nn.ModuleDict({key: torch.nn.Linear(4, 4) for key in ("up", "down", "other")})
    net["deep"] = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})
    apply_quantization_config(net, QuantizationConfig.model_validate(config))
    theirs = net.get_submodule(name).quantization_scheme.input_activations
    strategies = {"token": InputArgs(), "tensor": InputArgs("per_tensor", dynamic=False)}
    assert inputs_of(config, [name], ["Linear", "Module"]) == (theirs and strategies[theirs.strategy])


def test_the_head_is_targeted_by_name_and_foreign_layers_are_not_passed_off_as_theirs() -> None:
    layers = {"a": ("Linear", CHANNEL), "lm_head": ("OutputHead", CHANNEL)}
    config = quantization_config(layers, [], ecosystem=True)
    assert config["config_groups"]["group_0"]["targets"] == ["lm_head", "Linear"]
    assert quantization_config({"conv": ("Conv2d", CHANNEL)}, [], ecosystem=False)["quant_method"] == "octavo"


@pytest.mark.parametrize(
    ("schemes", "layout"),
    [
        ((CHANNEL,), "pack-quantized"),
        ((GROUP_32,), "pack-quantized"),
        ((CHANNEL, GROUP_32), "pack-quantized"),
        ((W8A8,), "int-quantized"),
        ((Scheme("o2"), STATIC), "int-quantized"),
        ((CHANNEL, W8A8, STATIC, GROUP_32), "mixed-precision"),
    ],
)
def test_the_real_packages_accept_the_config(schemes: tuple[Scheme, ...], layout: str) -> None:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("transformers")
    from compressed_tensors.quantization import QuantizationConfig
    from transformers.utils.quantization_config import CompressedTensorsConfig

    layers = {f"layer.{i}": ("Linear", scheme) for i, scheme in enumerate(schemes)}
    config = json.loads(json.dumps(quantization_config(layers, ["lm_head"], ecosystem=True)))
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == layout and parsed.ignore == ["lm_head"]
    for i, scheme in enumerate(schemes):
        weights = parsed.config_groups[f"group_{i}"].weights
        assert (weights.num_bits, weights.type, weights.symmetric) == (8, "int", True)
        assert (weights.strategy, weights.group_size) == (
            ("group", 32) if scheme.weight.group_size else ("channel", None)
        )
        inputs = parsed.config_groups[f"group_{i}"].input_activations
        assert (inputs is not None) == (scheme.input is not None)
        assert inputs is None or inputs.dynamic == scheme.input.dynamic  # type: ignore[union-attr]
    assert CompressedTensorsConfig(**config).quantization_config == parsed
    check_readable(config, "config.json")
    check_readable(parsed.model_dump(mode="json"), "config.json")


LLM_COMPRESSOR = {
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": "static",
                "block_structure": None,
                "dynamic": False,
                "group_size": 128,
                "num_bits": 8,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.13.0",
}
"""As llm-compressor 0.9 writes W8A16."""


def edited(path: str, value: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(LLM_COMPRESSOR))
    node = config
    *parents, last = path.split("/")
    for key in parents:
        node = node[key]
    node[last] = value
    return config


@pytest.mark.parametrize(
    "config",
    [
        LLM_COMPRESSOR,
        edited("format", "mixed-precision"),
        edited("config_groups/group_0/format", None),
        edited("config_groups/group_0/weights/strategy", "channel"),
        edited("sparsity_config", {"format": "dense", "global_sparsity": 0.1}),
        edited("quantization_status", "frozen"),
        edited("config_groups/group_0/weights/strategy", "tensor"),
    ],
)
def test_w8a16_of_llm_compressor_is_readable(config: dict[str, Any]) -> None:
    check_readable(config, "config.json")
    assert inputs_of(config, ["model.layers.0.mlp.up_proj"], ["Linear"]) is None


INT8_INPUTS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": True,
    "group_size": None,
    "num_bits": 8,
    "observer": None,
    "observer_kwargs": {},
    "strategy": "token",
    "symmetric": True,
    "type": "int",
}
"""As llm-compressor 0.9 writes the inputs of W8A8."""


def with_inputs(**changes: Any) -> dict[str, Any]:
    config = edited("config_groups/group_0/input_activations", {**INT8_INPUTS, **changes})
    config["format"] = config["config_groups"]["group_0"]["format"] = "int-quantized"
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "channel", "group_size": None, "actorder": None}
    return config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, InputArgs()),
        ({"strategy": "tensor"}, InputArgs("per_tensor")),
        ({"strategy": "tensor", "dynamic": False, "observer": "minmax"}, InputArgs("per_tensor", dynamic=False)),
    ],
)
def test_w8a8_of_llm_compressor_is_readable(changes: dict[str, Any], expected: InputArgs) -> None:
    check_readable(with_inputs(**changes), "config.json")
    assert inputs_of(with_inputs(**changes), ["model.layers.0.mlp.up_proj"], ["Linear"]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symmetric": False}, r"input_activations.symmetric False, expected True"),
        ({"num_bits": 4}, r"input_activations.num_bits 4, expected 8"),
        ({"type": "float"}, r"input_activations.type 'float'"),
        ({"strategy": "group"}, r"input_activations.strategy 'group', expected 'token' or 'tensor'"),
        ({"dynamic": "local"}, r"input_activations.dynamic 'local'"),
        ({"dynamic": False}, r"input_activations.dynamic False with strategy 'token', expected True"),
    ],
)
def test_inputs_that_octavo_cannot_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config has .*{message}"):
        check_readable(with_inputs(**changes), "config.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "gptq", "quant_method 'gptq'"),
        ("quant_method", None, "quant_method None"),
        ("config_groups", {}, "config_groups {}"),
        ("config_groups/group_0", ["Linear"], r"config_groups.group_0 \['Linear'\]"),
        ("config_groups/group_0/targets", "Linear", r"group_0.targets 'Linear', expected a list"),
        ("config_groups/group_0/targets", [None], r"group_0.targets \[None\], expected a list"),
        (
            "config_groups/group_0/targets",
            ["re:("],
            r"group_0.targets 're:\(', expected a regular expression \(missing",
        ),
        ("ignore", "lm_head", r"ignore 'lm_head', expected a list"),
        ("ignore", [5], r"ignore \[5\], expected a list"),
        ("ignore", ["lm_head", "re:*"], r"ignore 're:\*', expected a regular expression \(nothing to repeat"),
        ("config_groups/group_0/format", "naive-quantized", "format 'naive-quantized' for config_groups.group_0"),
        ("config_groups/group_0/weights", None, r"group_0.weights None"),
        ("config_groups/group_0/weights/num_bits", 4, r"weights.num_bits 4, expected 8"),
        ("config_groups/group_0/weights/type", "float", r"weights.type 'float'"),
        ("config_groups/group_0/weights/symmetric", False, r"weights.symmetric False, expected True"),
        (
            "config_groups/group_0/weights/strategy",
            "block",
            r"weights.strategy 'block', expected 'channel' or",
        ),
        ("config_groups/group_0/weights/actorder", "group", r"weights.actorder 'group'"),
        ("config_groups/group_0/weights/dynamic", True, r"weights.dynamic True"),
        ("config_groups/group_0/input_activations", {"num_bits": 8}, r"input_activations.strategy None"),
        ("config_groups/group_0/input_activations", ["int8"], r"input_activations \['int8'\]"),
        ("config_groups/group_0/output_activations", {"num_bits": 8}, r"output_activations \(quantized outputs\)"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
        ("transform_config", {"config_groups": {}}, "transform_config"),
    ],
)
def test_what_octavo_cannot_run_is_refused_by_what_was_found(path: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^dir/config\.json: quantization_config has .*{message}"):
        check_readable(edited(path, value), "dir/config.json")


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^dir/config\.json: quantization_config has 'int8', expected an object"):
        check_readable("int8", "dir/config.json")  # type: ignore[arg-type]


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["channel", "group", "mixed", "with_head"])
def test_transformers_loads_the_checkpoint_and_computes_with_our_weights(
    tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96 if scheme in ("group", "mixed") else 70,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = modules.pop("lm_head")
    layers = {
        name: ("Linear", GROUP_32 if scheme == "group" or (scheme == "mixed" and "mlp" in name) else CHANNEL)
        for name in modules
    }
    if scheme == "with_head":
        modules["lm_head"] = head
        layers["lm_head"] = ("OutputHead", CHANNEL)

    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in layers
    }
    for name, module in modules.items():
        group_size = layers[name][1].weight.group_size
        codes, scale = quantize_weight(
            module.weight.detach(), "per_group" if group_size else "per_channel", group_size=group_size
        )
        tensors |= encode(f"{name}.weight", codes, scale, dtype, layers[name][1])
        module.weight.data = dequantize(codes, scale, dtype)
    with CheckpointWriter(tmp_path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    ignore = [] if scheme == "with_head" else ["lm_head"]
    as_dict = {**config.to_dict(), "quantization_config": quantization_config(layers, ignore, ecosystem=True)}
    as_dict["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(as_dict))

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_a_weight_that_the_package_compressed_is_read(tmp_path: Path, layout: str) -> None:
    """compressed-tensors' own codes use -128 and amax / 127.5; they are read as they are."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    packed = layout == "pack-quantized"
    config = LLM_COMPRESSOR if packed else with_inputs()
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    weight = torch.rand(6, 256) - 0.5
    weight[:, ::128] = -127.5 / 128
    granularity: Any = "per_group" if packed else "per_channel"
    scale = choose_scale(weight, granularity, group_size=128 if packed else None, value_range="full")
    compressor = BaseCompressor.load_from_registry(layout)
    theirs = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    with CheckpointWriter(tmp_path, {f"m.{n}": (t.dtype, tuple(t.shape)) for n, t in theirs.items()}) as writer:
        for name, tensor in theirs.items():
            writer.write(f"m.{name}", tensor)
    with CheckpointReader(tmp_path) as reader:
        codes, scale_back, _ = decode("m.weight", {name: reader.tensor(name) for name in reader.names})
    assert int(codes.min()) == -128
    assert torch.equal(dequantize(codes, scale_back), compressor.decompress(theirs, scheme)["weight"])
