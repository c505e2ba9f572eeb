"""What options that several verbs have do to a model."""

from __future__ import annotations

import pytest
import torch
import transformers

import octavo
from octavo.cli.verb import CommandError, keep_cache
from octavo.errors import OctavoError
from octavo.integrations.language_model import cache_name
from tests.tiny_models import VOCABULARY, bart, build, llama, tokens


def test_what_is_kept_where_nothing_is_asked_for() -> None:
    model = build(llama)
    assert keep_cache(model, None) == "float"
    octavo.quantize(model, "w8a16", attention="int8")
    assert keep_cache(model, "float") == "float" and keep_cache(model, None) == "int8"


def test_a_model_with_octavo_s_attention_keeps_a_float_cache_with_room_and_others_what_they_kept() -> None:
    from octavo.integrations.float_cache import FloatCache

    model, ids = build(llama), tokens(2, 9)
    name = str(cache_name(model))
    keep_cache(model, None)
    with torch.no_grad():
        assert not isinstance(getattr(model(ids), name), FloatCache)
        octavo.quantize(model, "w8a16")
        assert keep_cache(model, None) == "float" and isinstance(getattr(model(ids), name), FloatCache)
        other = build(llama)
        octavo.quantize(other, "w8a16", attention="int8")
        assert keep_cache(other, "float") == "float" and isinstance(getattr(other(ids), name), FloatCache)


def test_an_encoder_decoder_keeps_its_own_and_an_int8_cache_is_refused() -> None:
    model = build(bart)
    octavo.quantize(model, "w8a16", attention="int8")
    assert keep_cache(model, None) == "float"
    with pytest.raises(OctavoError, match="is an encoder-decoder's"):
        keep_cache(model, "int8")


def test_an_int8_cache_of_a_model_without_keys_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    assert keep_cache(model, None) == "float"
    with pytest.raises(CommandError, match="--cache is int8, and MambaForCausalLM keeps its state in no key-value"):
        keep_cache(model, "int8")
