"""The class of a checkpoint's model, by its config."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModel

from octavo import CheckpointError
from octavo.integrations.model_classes import model_class_of, skeleton
from tests.tiny_models import build, llama


def test_a_class_in_code_of_its_own_beside_a_tokenizer_in_such(tmp_path: Path) -> None:
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None], "AutoModel": "modeling_own.OwnModel"}
    config = SimpleNamespace(architectures=["OwnModel"], auto_map=code)
    assert model_class_of(config, tmp_path) is AutoModel


@pytest.mark.parametrize("name", ["BertModel", "WhisperModel"])
def test_a_class_that_the_config_is_not_of(tmp_path: Path, name: str) -> None:
    build(llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(CheckpointError, match=rf"config\.json: transformers cannot build a {name} of it: .*correct"):
        skeleton(tmp_path)
