"""Checkpoints on disk, against the safetensors library, real damage, and the kernel's own count of resident memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.formats.checkpoint import CheckpointReader, CheckpointWriter

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = int(torch.tensor(shape).prod()) if shape else 1
    low, high = (0, 2) if dtype == torch.bool else (0, 256)
    return torch.randint(low, high, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def plan_of(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], **kwargs: Any) -> None:
    with CheckpointWriter(folder, plan_of(tensors), **kwargs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def sharded(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of two shards, with two tensors in each; returns its tensors."""
    tensors = {f"layer.{i}.weight": torch.randn(8, 16) for i in range(4)}
    write(folder, tensors, max_shard_size=2 * 8 * 16 * 4)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return tensors


# -- writing ----------------------------------------------------------------------------------------------------------


def test_every_dtype_and_odd_shape_reads_back_with_safetensors_bit_for_bit(tmp_path: Path) -> None:
    tensors = {}
    for dtype in DTYPES:
        for shape in [(), (0,), (3, 0, 2), (1,), (3, 5), (2, 3, 4)]:
            tensors[f"{dtype}{shape}"] = random_tensor(dtype, shape)
    write(tmp_path, tensors)

    real = load_file(tmp_path / "model.safetensors")
    assert real.keys() == tensors.keys()
    assert all(same_bits(real[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.names) == tensors.keys()
        assert all(same_bits(reader.tensor(name), tensor) for name, tensor in tensors.items())


@given(
    spec=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple)), min_size=1, max_size=12
    ),
    max_shard_size=st.sampled_from([1, 64, 200, "200", "1KB"]),
)
def test_any_plan_reads_back_through_index_and_shards(
    tmp_path_factory: pytest.TempPathFactory,
    spec: list[tuple[torch.dtype, tuple[int, ...]]],
    max_shard_size: int | str,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {f"t{i}": random_tensor(dtype, shape) for i, (dtype, shape) in enumerate(spec)}
    write(folder, tensors, max_shard_size=max_shard_size)

    files = sorted(folder.glob("*.safetensors"))
    real = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert real.keys() == tensors.keys()
    assert all(same_bits(real[name], tensor) for name, tensor in tensors.items())
    assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)
    with CheckpointReader(folder) as reader:
        assert all(same_bits(reader.tensor(name), tensor) for name, tensor in tensors.items())


def test_shards_and_index_are_those_that_the_hub_library_writes(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors = {"a": torch.randn(10), "big": torch.randn(1000), "b": torch.randn(20), "c": torch.randn(100)}
    for who in ("ours", "hub"):
        (tmp_path / who).mkdir()
    save_torch_state_dict(tensors, tmp_path / "hub", max_shard_size=420)
    write(tmp_path / "ours", tensors, max_shard_size=420)

    ours, hub = (json.loads((tmp_path / who / "model.safetensors.index.json").read_text()) for who in ("ours", "hub"))
    assert ours == hub
    assert len(set(ours["weight_map"].values())) == 3


def test_strides_order_and_views_do_not_matter(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {"transposed": base.t(), "slice": base[1:4, 2:5], "expanded": torch.ones(1, 3).expand(4, 3)}
    parameter = torch.nn.Parameter(torch.randn(3))
    with CheckpointWriter(tmp_path, plan_of({**tensors, "parameter": parameter})) as writer:
        writer.write("parameter", parameter)
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    real = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(real[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(real["parameter"], parameter.detach())


def test_each_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(3, dtype=dtype) for dtype in (torch.uint8, torch.float64, torch.float32)}
    write(tmp_path, tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(2), "not in the plan"),
        ("a", torch.zeros(3), r"\[3\].*planned.*\[2\]"),
        ("a", torch.zeros(2, dtype=torch.int8), "int8.*planned.*float32"),
        ("a", torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_a_tensor_that_was_not_planned_is_refused(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    writer = CheckpointWriter(tmp_path, {"a": (torch.float32, (2,))})
    with pytest.raises(CheckpointError, match=message):
        writer.write(name, tensor)


def test_a_tensor_is_written_once_and_none_is_forgotten(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))})
    writer.write("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match="'a' was written already"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match="1 of 2 planned tensors were not written, such as 'b'"):
        writer.close()


def test_an_exception_in_the_body_is_not_hidden_by_the_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, {"a": (torch.float32, (2,))}):
        _ = 1 / 0


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor"):
        CheckpointWriter(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"'z' is of dtype torch.complex128"):
        CheckpointWriter(tmp_path, {"z": (torch.complex128, (1,))})
    with pytest.raises(CheckpointError, match="max_shard_size is '5 parsecs'"):
        CheckpointWriter(tmp_path, {"a": (torch.float32, (1,))}, max_shard_size="5 parsecs")


def test_a_disk_too_small_for_the_plan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    needed = 2 * shutil.disk_usage(tmp_path).total
    with pytest.raises(CheckpointError, match=rf"disk is full.*{needed / 1e6:.0f} MB are needed"):
        CheckpointWriter(tmp_path, {"a": (torch.uint8, (needed,))})
    assert list(tmp_path.iterdir()) == []


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_single_file_under_any_name_and_a_lone_file(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5)}
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, str(tmp_path), tmp_path / "diffusion_pytorch_model.safetensors"):
        with CheckpointReader(path) as reader:
            assert all(torch.equal(reader.tensor(name), tensors[name]) for name in ("a", "b"))
            assert reader.config == ({"model_type": "x"} if Path(path).is_dir() else None)
            info = reader.info("b")
            assert (info.name, info.dtype, info.shape, info.nbytes) == ("b", torch.float32, (3, 4), 48)
            assert info.file == tmp_path / "diffusion_pytorch_model.safetensors"


def test_names_are_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        assert reader.names == list(tensors)
    wide = torch.zeros(2, dtype=torch.float64)  # the library puts it first
    save_file({"b": torch.zeros(2), "a": wide, "c": wide.clone()}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as real, CheckpointReader(tmp_path) as reader:
        assert reader.names == real.offset_keys() != sorted(reader.names)


def test_a_tensor_is_the_callers_own(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(4)})
    before = (tmp_path / "model.safetensors").read_bytes()
    with CheckpointReader(tmp_path) as reader:
        first = reader.tensor("a")
        first.add_(1)
        assert torch.equal(reader.tensor("a"), torch.zeros(4))
    assert torch.equal(first, torch.ones(4))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_shards_of_a_variant(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.fp16.json")
    with CheckpointReader(tmp_path) as reader:
        assert sorted(reader.names) == sorted(tensors)


def test_the_index_without_a_variant_counts(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model.fp16-00001-of-00001.safetensors")
    variant = json.dumps({"weight_map": {"layer.0.weight": "model.fp16-00001-of-00001.safetensors"}})
    (tmp_path / "model.safetensors.index.fp16.json").write_text(variant)
    with CheckpointReader(tmp_path) as reader:
        assert sorted(reader.names) == sorted(tensors)


def test_of_several_variants_none_is_meant(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    for variant in ("bf16", "fp16"):
        index = tmp_path / f"model.safetensors.index.{variant}.json"
        index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    several = r"several sets of weights \(model.safetensors.index.bf16.json, model.safetensors.index.fp16.json\)"
    with pytest.raises(CheckpointError, match=several):
        CheckpointReader(tmp_path)


def test_the_hubs_cache_of_links_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    tensors = sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..", "blobs", file.name))
    with CheckpointReader(tmp_path / "snapshot") as reader:
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())


def truncate(folder: Path) -> str:
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    return shard.name


def lengthen(folder: Path) -> str:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")
    return shard.name


def garble_header(folder: Path) -> str:
    shard = folder / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[10] ^= 0xFF
    shard.write_bytes(data)
    return shard.name


def empty(folder: Path) -> str:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    return "model-00001-of-00002.safetensors"


def leave_a_pointer(folder: Path) -> str:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "model-00001-of-00002.safetensors").write_text(pointer)
    return "model-00001-of-00002.safetensors.*git lfs pull"


def unknown_dtype(folder: Path) -> str:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    return "model.safetensors.*(F4|truncated or corrupt)"


def edit_index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        edit(content)
        index.write_text(json.dumps(content))

    return damage


def lose_a_shard(folder: Path) -> str:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "1 of its 2 shards are missing: model-00002-of-00002.safetensors"


def name_a_missing_tensor(folder: Path) -> str:
    edit_index(lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))(folder)
    return "model-00001-of-00002.safetensors holds tensor 'ghost', and it does not"


def name_the_wrong_shard(folder: Path) -> str:
    edit_index(lambda index: index["weight_map"].update({"layer.0.weight": "model-00002-of-00002.safetensors"}))(folder)
    return "model-00002-of-00002.safetensors holds tensor 'layer.0.weight', and it does not"


def forget_a_tensor(folder: Path) -> str:
    edit_index(lambda index: index["weight_map"].pop("layer.0.weight"))(folder)
    return "not in its index, such as 'layer.0.weight' in model-00001-of-00002.safetensors"


def hold_a_tensor_twice(folder: Path) -> str:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "copy.safetensors")
    edit_index(lambda index: index["weight_map"].update({"layer.0.weight": "copy.safetensors"}))(folder)
    return "copy.safetensors.*which.*holds too|which copy.safetensors holds too"


def lead_out(path: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "stolen.safetensors")
        shard = path.replace("FOLDER", str(folder.parent))
        edit_index(lambda index: index["weight_map"].update({"layer.0.weight": shard}))(folder)
        return "leads out of the folder"

    return damage


def break_json(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    return "model.safetensors.index.json: cannot be read as JSON"


def drop_weight_map(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return "model.safetensors.index.json: has no usable weight_map"


def break_config(folder: Path) -> str:
    (folder / "config.json").write_text("{'single': 'quotes'}")
    return "config.json: cannot be read as JSON"


def list_as_config(folder: Path) -> str:
    (folder / "config.json").write_text("[1]")
    return "config.json: holds a JSON list, expected an object"


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lengthen,
        garble_header,
        empty,
        leave_a_pointer,
        unknown_dtype,
        lose_a_shard,
        name_a_missing_tensor,
        name_the_wrong_shard,
        forget_a_tensor,
        hold_a_tensor_twice,
        lead_out("../stolen.safetensors"),
        lead_out("sub/../../stolen.safetensors"),
        lead_out("FOLDER/stolen.safetensors"),
        lead_out("..\\stolen.safetensors"),
        lead_out("C:stolen.safetensors"),
        break_json,
        drop_weight_map,
        break_config,
        list_as_config,
    ],
)
def test_a_damaged_checkpoint_is_known_at_once_and_the_file_is_named(
    tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    sharded(folder)
    CheckpointReader(folder)
    with pytest.raises(CheckpointError, match=damage(folder)):
        CheckpointReader(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such file or folder"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no weights"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model.bin\).*save_pretrained"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is not a .safetensors file.*load_state_dict"):
        CheckpointReader(tmp_path / "pytorch_model.bin")
    for name in ("unet.fp16.safetensors", "unet.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several sets of weights \(unet.fp16.safetensors, unet.safetensors\)"):
        CheckpointReader(tmp_path)


def test_an_unknown_tensor_and_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(100)})
    with CheckpointReader(tmp_path) as reader:
        with pytest.raises(CheckpointError, match=r"no tensor 'b'; it has 1, such as \['a'\]"):
            reader.tensor("b")
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(CheckpointError, match=r"ends within tensor 'a'.*expected 400"):
            reader.tensor("a")


def peak_of(work: Callable[[], None]) -> int:
    """Bytes by which the peak of resident memory, mapped files included, rises over what is resident before."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("needs Linux's /proc/self/clear_refs to reset the peak of resident memory")
    before = status("VmRSS:")
    work()
    return status("VmHWM:") - before


def check_streaming(folder: Path, tensors: int, mib: int) -> None:
    size = mib << 20
    plan = {f"t{i}": (torch.bfloat16, (mib, size // 2 // mib)) for i in range(tensors)}

    def write_all() -> None:
        with CheckpointWriter(folder, plan) as writer:
            for i, (name, (dtype, shape)) in enumerate(plan.items()):
                writer.write(name, torch.full(shape, i, dtype=dtype))

    def read_all() -> None:
        with CheckpointReader(folder) as reader:
            for i, name in enumerate(reader.names):
                assert reader.tensor(name)[0, 0] == i

    assert peak_of(write_all) < 2.2 * size
    assert peak_of(read_all) < 2.2 * size


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    check_streaming(tmp_path, tensors=5, mib=50)


@pytest.mark.slow
def test_one_tensor_at_a_time_is_in_memory_on_a_gigabyte(tmp_path: Path) -> None:
    check_streaming(tmp_path, tensors=10, mib=100)
