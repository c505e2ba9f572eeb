"""What lies beside the weights is copied, and weights are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.errors import CheckpointError
from octavo.formats.companions import copy_companions
from octavo.formats.outputs import new_folder


def touch(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


COMPANIONS = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "README.md",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "modeling_custom.py",
    "tokenizer.json",
    "tokenizer.model",
]
NOT_COMPANIONS = [
    ".cache/huggingface/x.metadata",
    ".gitattributes",
    "__pycache__/modeling_custom.cpython-311.pyc",
    "adapter_config.json",
    "adapter_model.safetensors",
    "additional_chat_templates/.hidden",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/trainer_state.json",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.fp16.json",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "onnx/tokenizer.json",
    "openvino/sub/model.bin",
    "openvino/sub/model.xml",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rust_model.ot",
    "tf_model.h5",
]


def test_companions_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    touch(src, COMPANIONS + NOT_COMPANIONS)
    parts = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (src / "modules.json").write_text(json.dumps(parts))
    dst.mkdir()
    expected = sorted([*COMPANIONS, "modules.json"])
    assert copy_companions(src, dst) == expected
    assert sorted(path.relative_to(dst).as_posix() for path in dst.rglob("*") if path.is_file()) == expected
    assert all((dst / name).read_bytes() == (src / name).read_bytes() for name in expected)


def test_companions_that_are_links_become_files(tmp_path: Path) -> None:
    touch(tmp_path, ["blobs/1234", "dst/.keep"])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "tokenizer.json").symlink_to("../blobs/1234")
    assert copy_companions(tmp_path / "src", tmp_path / "dst") == ["tokenizer.json"]
    copied = tmp_path / "dst" / "tokenizer.json"
    assert not copied.is_symlink() and copied.read_text() == "blobs/1234"

    (tmp_path / "src" / "vocab.txt").symlink_to("../blobs/absent")
    with pytest.raises(CheckpointError, match=r"vocab.txt: is a link to a file that is not there"):
        copy_companions(tmp_path / "src", tmp_path / "dst")


def test_companions_of_a_lone_file_and_of_a_folder_being_written_into(tmp_path: Path) -> None:
    touch(tmp_path, ["src/model.safetensors", "src/vocab.txt"])
    assert copy_companions(tmp_path / "src" / "model.safetensors", tmp_path) == []
    with new_folder(tmp_path / "src" / "int8") as folder:
        assert copy_companions(tmp_path / "src", folder) == ["vocab.txt"]
        (folder / "model.safetensors").touch()
    with new_folder(tmp_path / "src" / "again") as folder:
        assert copy_companions(tmp_path / "src", folder) == ["vocab.txt"]


@pytest.mark.parametrize("content", ["{", '{"path": 1}', '[{"name": "x"}]', "[1]"])
def test_a_modules_json_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules.json: expected a JSON list"):
        copy_companions(tmp_path, tmp_path / "dst")
