"""What options that several verbs have do to a model."""

from __future__ import annotations

import pytest

import octavo
from octavo.cli.verb import keep_cache
from octavo.errors import OctavoError
from tests.tiny_models import bart, build, llama


def test_what_is_kept_where_nothing_is_asked_for() -> None:
    model = build(llama)
    assert keep_cache(model, None) == "float"
    octavo.quantize(model, "w8a16", attention="int8")
    assert keep_cache(model, "float") == "float" and keep_cache(model, None) == "int8"


def test_an_encoder_decoder_keeps_its_own_and_an_int8_cache_is_refused() -> None:
    model = build(bart)
    octavo.quantize(model, "w8a16", attention="int8")
    assert keep_cache(model, None) == "float"
    with pytest.raises(OctavoError, match="is an encoder-decoder's"):
        keep_cache(model, "int8")
