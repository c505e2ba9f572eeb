"""A float cache with room gives the bits of transformers' own, whatever is done to it; and copies nothing per token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import octavo
from octavo import OctavoError
from tests.integrations.test_int8_cache import MODELS, built, falcon_h1, in_pieces
from tests.tiny_models import bart, build, llama, tokens, vit

transformers = pytest.importorskip("transformers")

from octavo.integrations.attention import use_int8_attention  # noqa: E402
from octavo.integrations.float_cache import FloatCache, FloatLayer, use_float_cache  # noqa: E402
from octavo.integrations.language_model import cache_name  # noqa: E402


def own_cache(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("pieces", [(9,), (5, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_transformers_cache(
    make: Callable[..., Any], pieces: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, ids = built(make, dtype), tokens(2, 14)
    cache = FloatCache(model.config)
    assert torch.equal(in_pieces(model, ids, cache, *pieces), in_pieces(model, ids, own_cache(model), *pieces))
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_attention_of_it(dtype: torch.dtype) -> None:
    model, ids = build(llama, dtype), tokens(2, 14)
    use_int8_attention(model)
    assert torch.equal(in_pieces(model, ids, FloatCache(model.config), 5), in_pieces(model, ids, own_cache(model), 5))


def test_a_state_beside_keys_and_values_stays_as_it_is() -> None:
    if not hasattr(transformers, "FalconH1Config"):
        pytest.skip("this version of transformers has no Falcon-H1")
    model, ids = built(falcon_h1), tokens(2, 14)
    cache = FloatCache(model.config)
    assert torch.equal(in_pieces(model, ids, cache, 9), in_pieces(model, ids, own_cache(model), 9))
    assert isinstance(cache.layers[0], FloatLayer)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2}])
def test_generation(how: dict[str, Any]) -> None:
    model = built(llama)
    ids = tokens(1 if "prompt_lookup_num_tokens" in how else 2, 9)
    options = {"max_new_tokens": 90, "pad_token_id": 0, "do_sample": "num_return_sequences" in how, **how}

    def written(cache: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, **{str(cache_name(model)): cache}, **options)

    assert torch.equal(written(FloatCache(model.config)), written(own_cache(model)))


def test_tokens_are_taken_back_and_others_follow() -> None:
    model, ids, others = built(llama), tokens(2, 9), tokens(2, 6)
    caches = FloatCache(model.config), own_cache(model)
    for cache in caches:
        in_pieces(model, ids, cache, 9)
        cache.crop(-4)
    own, expected = (in_pieces(model, others, cache, 3) for cache in caches)
    assert torch.equal(own, expected)


def test_a_copy_goes_its_own_way() -> None:
    model, ids, others = built(llama), tokens(2, 9), tokens(2, 6)
    cache = FloatCache(model.config)
    in_pieces(model, ids, cache, 9)
    other = copy.deepcopy(cache)
    in_pieces(model, others, other)
    expected = own_cache(model)
    in_pieces(model, ids, expected, 9)
    assert torch.equal(in_pieces(model, ids, cache), in_pieces(model, ids, expected))


def test_tokens_that_come_one_by_one_are_not_copied_each_time() -> None:
    cache = FloatCache(built(llama).config)
    places, expected = set(), []
    for token in range(170):
        states = torch.full((1, 2, 1, 16), float(token))
        keys, values = cache.update(states, -states, 0)
        expected.append(states)
        places.add(keys.data_ptr())
    assert len(places) < 5
    assert torch.equal(keys, torch.cat(expected, 2)) and torch.equal(values, -keys)


@pytest.mark.parametrize("what", ["batch", "dtype", "size"])
def test_states_that_do_not_follow_are_answered_as_transformers_does(what: str) -> None:
    first = torch.randn(2, 2, 3, 16)
    then = {"batch": torch.randn(1, 2, 1, 16), "dtype": torch.randn(2, 2, 1, 16).double(), "size": first[..., :8]}[what]
    model = built(llama)
    caches = FloatCache(model.config), own_cache(model)
    for cache in caches:
        cache.update(first, first, 0)
    if what == "dtype":
        (keys, _), (expected, _) = (cache.update(then, then, 0) for cache in caches)
        assert keys.dtype == torch.float64 and torch.equal(keys, expected)
    else:
        for cache in caches:
            with pytest.raises(RuntimeError, match="must match"):
                cache.update(then, then, 0)


def test_gradients_pass() -> None:
    found = []
    for make in (FloatCache, lambda config: transformers.DynamicCache(config=config)):
        model, ids = built(llama).train(), tokens(2, 9)
        model(ids, use_cache=True, **{str(cache_name(model)): make(model.config)}).logits.square().sum().backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert found[0].count_nonzero() and torch.equal(*found)


def test_a_compiled_model_takes_it() -> None:
    model, ids = built(llama), tokens(2, 9)
    expected = in_pieces(model, ids, own_cache(model), 8)
    model.forward = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(in_pieces(model, ids, FloatCache(model.config), 8), expected)


def test_a_model_makes_it_by_itself() -> None:
    model, ids = built(llama), tokens(2, 9)
    octavo.quantize(model, "w8a16")
    name, options = str(cache_name(model)), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, return_dict_in_generate=True, **options)
    handle = use_float_cache(model)
    after = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(before.sequences, after.sequences) and isinstance(getattr(after, name), FloatCache)
    with torch.no_grad():
        assert isinstance(getattr(model(ids), name), FloatCache) and getattr(model(ids, use_cache=False), name) is None
    handle.remove()
    assert type(getattr(model.generate(ids, return_dict_in_generate=True, **options), name)) is type(own_cache(model))


def test_models_that_keep_something_else_are_refused() -> None:
    with pytest.raises(OctavoError, match="FloatCache is for decoders, and BartConfig is an encoder-decoder's"):
        use_float_cache(build(bart))
    with pytest.raises(OctavoError, match="ViTForImageClassification keeps no key-value cache"):
        use_float_cache(build(vit))
