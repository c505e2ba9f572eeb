"""A cache in int8 gives what dequantized keys and values give; with int8 attention, the bits that it gives anyway."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from octavo import OctavoError, ops
from octavo.ops.attention import value_codes
from tests.tiny_models import TEXT, bart, build, gemma3, gpt2, llama, mixtral, qwen2, tokens, vit

transformers = pytest.importorskip("transformers")

from transformers.cache_utils import DynamicLayer  # noqa: E402

from octavo.integrations import caches  # noqa: E402
from octavo.integrations.attention import use_int8_attention  # noqa: E402
from octavo.integrations.float_attention import use_float_attention  # noqa: E402
from octavo.integrations.int8_cache import Int8Cache, use_int8_cache  # noqa: E402
from octavo.integrations.language_model import cache_name  # noqa: E402


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4))


def odd_heads() -> Any:
    """Of a size that is no multiple of four."""
    return llama(head_dim=6)


def experts() -> Any:
    return mixtral(intermediate_size=40)  # torch's grouped product wants rows of 16 bytes


def falcon_h1() -> Any:
    config = transformers.FalconH1Config(
        **TEXT, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


MODELS = [llama, odd_heads, qwen2, gpt2, mistral, experts, gemma3]


def built(make: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Any:
    """With scores that matter: those of random weights are next to zero."""
    model = build(make, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "c_attn.weight")):
                weight *= 10
    use_float_attention(model)
    return model


def in_pieces(model: Any, ids: Tensor, cache: Any, *pieces: int) -> Tensor:
    """Logits of all tokens, fed so many at a time and one by one at the end."""
    found = []
    with torch.no_grad():
        for piece in ids.split([*pieces, *[1] * (ids.shape[1] - sum(pieces))], 1):
            found.append(model(input_ids=piece, use_cache=True, **{str(cache_name(model)): cache}).logits)
    return torch.cat(found, 1)


def rounded_cache(model: Any) -> Any:
    """transformers' own cache, of keys and values that were quantized and dequantized."""
    cache = transformers.DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.update = _rounding(layer.update)
    return cache


def _rounding(update: Callable[..., Any]) -> Callable[..., Any]:
    def rounded(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        pairs = ops.quantize_per_token(key), value_codes(value)
        return update(*((codes * scale).to(key.dtype) for codes, scale in pairs), *args, **kwargs)

    return rounded


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("pieces", [(9,), (5, 4), ()])
def test_answers_are_those_of_dequantized_keys_and_values(make: Callable[..., Any], pieces: tuple[int, ...]) -> None:
    model, ids = built(make), tokens(2, 14)
    cache = Int8Cache(model.config)
    logits = in_pieces(model, ids, cache, *pieces)
    expected = in_pieces(model, ids, rounded_cache(model), *pieces)
    exact = in_pieces(model, ids, transformers.DynamicCache(config=model.config), *pieces)
    lost = (expected - exact).norm()
    assert 0 < lost < 0.1 * exact.norm()
    # Sums in another order may take a number that lies half way between two codes to the other.
    assert (logits - expected).norm() < 0.05 * lost
    assert all(layer.keys.dtype == layer.values.dtype == torch.int8 for layer in cache.layers)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("make", [llama, mistral, gemma3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(make: Callable[..., Any], dtype: torch.dtype) -> None:
    model, ids = built(make, dtype), tokens(2, 14)
    logits, expected = (
        in_pieces(model, ids, cache, 5).float() for cache in (Int8Cache(model.config), rounded_cache(model))
    )
    assert logits.isfinite().all() and (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("make", [llama, mistral, qwen2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_attention_has_the_same_bits(make: Callable[..., Any], dtype: torch.dtype) -> None:
    model, ids = build(make, dtype), tokens(2, 14)
    use_int8_attention(model)
    anyway = in_pieces(model, ids, transformers.DynamicCache(config=model.config), 5)
    assert torch.equal(in_pieces(model, ids, Int8Cache(model.config), 5), anyway)


def test_attention_that_is_not_octavo_s_reads_numbers_and_is_told_of() -> None:
    model, ids = built(llama), tokens(2, 14)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="attention is computed by 'eager', for which an Int8Cache dequantizes all"):
        cache = Int8Cache(model.config)
    logits = in_pieces(model, ids, cache, 5)
    torch.testing.assert_close(logits, in_pieces(model, ids, rounded_cache(model), 5), rtol=1e-4, atol=1e-5)


def test_a_mask_of_padding() -> None:
    model, ids = built(llama), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    name = str(cache_name(model))
    with torch.no_grad():
        logits, expected = (
            model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}).logits[:, 3:]
            for cache in (Int8Cache(model.config), rounded_cache(model))
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2}])
def test_generation(how: dict[str, Any]) -> None:
    """Beams reorder a cache, guesses of several tokens crop it."""
    model, ids = built(llama), tokens(1, 6).repeat(1, 2)
    if "num_return_sequences" in how:
        how = {"num_beams": 2, **how}
    name, options = str(cache_name(model)), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **how}
    ours, theirs = (
        model.generate(ids, **{name: cache}, **options) for cache in (Int8Cache(model.config), rounded_cache(model))
    )
    assert torch.equal(ours, theirs)


def test_tokens_are_taken_back() -> None:
    model, ids = built(llama), tokens(2, 14)
    cache, short = Int8Cache(model.config), Int8Cache(model.config)
    in_pieces(model, ids, cache, 9)
    cache.crop(-5)
    assert cache.get_seq_length() == 9
    other = tokens(2, 5)
    again = in_pieces(model, other, cache)
    in_pieces(model, ids[:, :9], short, 9)
    assert torch.equal(again, in_pieces(model, other, short))
    cache.reset()
    assert torch.equal(in_pieces(model, ids, cache, 9), in_pieces(model, ids, Int8Cache(model.config), 9))


def test_a_copy_goes_its_own_way() -> None:
    """Of a prefix that several continuations share."""
    model, prefix, ways = built(llama), tokens(1, 7), (tokens(1, 3), tokens(1, 3))
    cache = Int8Cache(model.config)
    in_pieces(model, prefix, cache, 7)
    caches = [copy.deepcopy(cache) for _ in ways]
    for way, own in zip(ways, caches, strict=True):
        fresh = Int8Cache(model.config)
        in_pieces(model, prefix, fresh, 7)
        assert torch.equal(in_pieces(model, way, own), in_pieces(model, way, fresh))
    assert cache.get_seq_length() == 7


def test_tokens_that_come_one_by_one_are_not_copied_each_time() -> None:
    cache = Int8Cache(built(llama).config)
    update = cache.layers[0].update
    update(*torch.randn(2, 1, 2, 80, 16))
    places = set()
    for _ in range(90):
        update(*torch.randn(2, 1, 2, 1, 16))
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) < 10
    layer = cache.layers[0]
    assert layer.keys.shape == (1, 2, 170, 24), "codes, and four bytes each of their scale and their value's"
    assert layer.values.shape == (1, 2, 170, 16)


def test_a_model_makes_it_by_itself() -> None:
    model, ids = built(llama), tokens(2, 9)
    name = str(cache_name(model))
    expected = in_pieces(model, ids, Int8Cache(model.config), 9)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **{name: Int8Cache(model.config)}, **options)
    before = model.generate(ids, return_dict_in_generate=True, **options)
    handle = use_int8_cache(model)
    with torch.no_grad():
        output = model(ids)
        assert isinstance(getattr(output, name), Int8Cache) and torch.equal(output.logits, expected)
        assert getattr(model(ids, use_cache=False), name) is None
        own = transformers.DynamicCache(config=model.config)
        in_pieces(model, ids, own, 9)
        assert getattr(model(ids[:, :1], **{name: own}), name) is own
    assert torch.equal(model.generate(ids, **options), written)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert not torch.equal(other.generate(ids, **options), written), "a copy is its own model"
    handle.remove()
    after = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(after.sequences, before.sequences) and type(getattr(after, name)) is transformers.DynamicCache


def test_a_quantized_model_too() -> None:
    model, ids = built(llama), tokens(2, 14)
    octavo.quantize(model, "w8a16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = Int8Cache(model.config)
    logits = in_pieces(model, ids, cache, 9)
    torch.testing.assert_close(logits, in_pieces(model, ids, rounded_cache(model), 9), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gemma3])
def test_a_model_that_is_compiled_keeps_it_between_its_graphs(make: Callable[..., Any]) -> None:
    model, ids = built(make), tokens(1, 9)
    use_int8_cache(model)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(ids).logits, expected)


def test_attention_that_is_compiled_itself_is_refused() -> None:
    model = built(llama)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(OctavoError, match=r"flex_attention.*set_attn_implementation"):
        use_int8_cache(model)


def test_a_gradient_is_refused() -> None:
    model = built(llama).train()
    with pytest.raises(OctavoError, match="a gradient was asked for through an Int8Cache, which is for inference"):
        model(tokens(2, 9), use_cache=True, **{str(cache_name(model)): Int8Cache(model.config)})


def test_models_that_keep_something_else_are_refused() -> None:
    with pytest.raises(OctavoError, match="Int8Cache is for decoders, and BartConfig is an encoder-decoder's"):
        Int8Cache(build(bart).config)
    with pytest.raises(OctavoError, match="ViTForImageClassification keeps no key-value cache"):
        use_int8_cache(build(vit))


def test_layers_that_keep_keys_in_a_way_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return super().update(key_states, value_states * 2)

    model = built(llama)
    cache = transformers.DynamicCache(config=model.config)
    cache.layers[1] = Own()
    monkeypatch.setattr(caches, "DynamicCache", lambda config: cache)
    with pytest.raises(OctavoError, match="an Int8Cache has no Own, which this model's attention keeps"):
        Int8Cache(model.config)


def test_a_state_beside_keys_and_values_stays_as_it_is() -> None:
    """Falcon-H1's layers have attention and a mixer each."""
    if not hasattr(transformers, "FalconH1Config"):
        pytest.skip("this version of transformers has no Falcon-H1")
    model = built(falcon_h1)
    ids, cache = tokens(2, 14), Int8Cache(model.config)
    logits, expected = in_pieces(model, ids, cache, 9), in_pieces(model, ids, rounded_cache(model), 9)
    assert cache.layers[0].keys.dtype == torch.int8
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
