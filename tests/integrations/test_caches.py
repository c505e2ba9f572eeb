"""What both caches of this package have in common."""

from __future__ import annotations

import concurrent.futures
import copy
import inspect
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.test_int8_cache import built, in_pieces, mistral
from tests.tiny_models import llama, tokens

transformers = pytest.importorskip("transformers")

from octavo.integrations import caches, int8_cache  # noqa: E402
from octavo.integrations.caches import has_room, room_for  # noqa: E402
from octavo.integrations.float_cache import FloatCache, use_float_cache  # noqa: E402
from octavo.integrations.int8_cache import Int8Cache, use_int8_cache  # noqa: E402
from octavo.integrations.language_model import cache_name  # noqa: E402


@pytest.mark.parametrize("make", [FloatCache, Int8Cache])
def test_what_was_begun_in_inference_mode_goes_on_outside(make: Any) -> None:
    """There, what was made in inference mode may not be written to."""
    model, ids = built(llama), tokens(2, 14)
    cache = make(model.config)
    with torch.inference_mode():
        model(ids[:, :9], use_cache=True, **{str(cache_name(model)): cache})
    expected = in_pieces(model, ids, make(model.config), 9)[:, 9:]
    assert torch.equal(in_pieces(model, ids[:, 9:], cache), expected)


@pytest.mark.parametrize("make", [FloatCache, Int8Cache])
def test_a_cache_is_used_again_after_a_reset(make: Any) -> None:
    model, ids, others = built(llama), tokens(2, 9), tokens(3, 6)
    cache = make(model.config)
    in_pieces(model, ids, cache, 9)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(in_pieces(model, others, cache, 3), in_pieces(model, others, make(model.config), 3))


@pytest.mark.parametrize("use", [use_float_cache, use_int8_cache])
def test_what_a_model_is_told_of_caches_is_heeded(use: Any) -> None:
    model, ids = built(llama), tokens(2, 9)
    name = str(cache_name(model))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    use(model)

    def kept(*args: Any, **more: Any) -> Any:
        return getattr(model.generate(ids, *args, **options, **more), name)

    assert isinstance(kept(), FloatCache | Int8Cache)
    assert type(kept(cache_implementation="static")) is transformers.StaticCache
    own = transformers.DynamicCache(config=model.config)
    assert kept(**{name: own}) is own
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later versions of transformers deprecate the name
        assert getattr(model(ids[:, :1], past_key_values=own), name) is own
        assert kept(past_key_values=own) is own
        place = list(inspect.signature(model.forward).parameters).index(name)
        assert getattr(model(ids[:, :1], *[None] * (place - 1), own), name) is own
    without = transformers.GenerationConfig(use_cache=False)
    assert kept(use_cache=False) is None and kept(without) is None and kept(generation_config=without) is None
    of_other_things = transformers.GenerationConfig(max_new_tokens=3)
    for told, expected in (("static", transformers.StaticCache), ("hybrid", FloatCache | Int8Cache)):
        model.generation_config.cache_implementation = told
        assert isinstance(kept(), expected) and isinstance(kept(of_other_things), expected)
    model.generation_config.cache_implementation = None
    model.config.use_cache = False
    with torch.no_grad():
        assert getattr(model(ids), name) is None
        assert isinstance(getattr(model(ids, use_cache=True), name), FloatCache | Int8Cache)


def kept(model: Any, ids: Tensor, **how: Any) -> set[type]:
    """The caches of a forward, and of what the model writes."""
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, **how}
    with torch.no_grad():
        outputs = model(ids), model.generate(ids, **options)
    return {type(getattr(output, str(cache_name(model)))) for output in outputs}


def test_of_two_caches_the_one_that_was_asked_for_last_is_kept() -> None:
    model, ids = built(llama), tokens(2, 9)
    first, second = use_float_cache(model), use_int8_cache(model)
    assert kept(model, ids) == {Int8Cache}
    second.remove()
    assert kept(model, ids) == {FloatCache}
    first.remove()
    assert kept(model, ids) == {transformers.DynamicCache}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_handles_are_removed_in_any_order(order: tuple[int, ...]) -> None:
    model, ids = built(llama), tokens(2, 9)
    asked = {0: use_float_cache(model), 1: use_int8_cache(model), 2: use_float_cache(model)}
    for number in order:
        handle = asked.pop(number)
        handle.remove()
        handle.remove()
        last = max(asked, default=None)
        assert kept(model, ids) == {{None: transformers.DynamicCache, 1: Int8Cache}.get(last, FloatCache)}
    assert "generate" not in vars(model) and not model._forward_pre_hooks


def test_what_somebody_else_put_in_the_place_of_generate_stays() -> None:
    model, ids, calls = built(llama), tokens(2, 9), []

    def counted(generate: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return generate(*args, **kwargs)

        return count

    below = model.generate = counted(model.generate)
    handle = use_float_cache(model)
    assert kept(model, ids) == {FloatCache} and len(calls) == 1
    above = model.generate = counted(model.generate)
    assert kept(model, ids) == {FloatCache} and len(calls) == 3
    handle.remove()
    assert model.generate is above and kept(model, ids) == {transformers.DynamicCache}
    model.generate = below
    use_int8_cache(model).remove()
    assert model.generate is below


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("use", [use_float_cache, use_int8_cache])
def test_a_model_that_keeps_one_is_copied_and_pickled(use: Any, copied: Callable[[Any], Any]) -> None:
    model, ids = built(llama), tokens(2, 9)
    expected = kept(model, ids)
    own = use(model)
    other = copied(model)
    assert kept(other, ids) == kept(model, ids) != expected
    own.remove()
    assert kept(model, ids) == expected and kept(other, ids) != expected, "each is its own model"
    again = use_int8_cache(other)
    assert kept(other, ids) == {Int8Cache}
    again.remove()
    assert kept(other, ids) != expected
    other.generate.__self__.remove()
    assert kept(other, ids) == expected


@pytest.mark.parametrize("assistant", ["it", "another", "both"])
@pytest.mark.parametrize("use", [use_float_cache, use_int8_cache])
@pytest.mark.parametrize("make", [llama, mistral])
def test_an_assistant_keeps_one(make: Callable[..., Any], use: Any, assistant: str) -> None:
    """What an assistant guesses changes nothing of what is written, and of a window's tokens some are taken back."""
    model, helper, ids = built(make), built(make), tokens(1, 9)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if assistant != "another":
        use(model)
    expected = model.generate(ids, **options)
    if assistant != "it":
        use(helper)
    with torch.no_grad():
        helper.lm_head.weight += 0.01 * torch.randn_like(helper.lm_head.weight)  # now and then it guesses wrongly
    assert torch.equal(model.generate(ids, assistant_model=helper, **options), expected)


@pytest.mark.parametrize("use", [use_float_cache, use_int8_cache])
def test_threads_write_at_once(use: Any) -> None:
    model, prompts = built(llama), [tokens(1, size) for size in (3, 5, 7, 9)]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    use(model)
    expected = [model.generate(ids, **options) for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
        written = list(threads.map(lambda ids: model.generate(ids, **options), prompts * 3))
    assert all(torch.equal(one, other) for one, other in zip(written, expected * 3, strict=True))


def test_what_was_said_is_not_said_again_and_nothing_else_is_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters of warnings are those of all threads."""
    model, ids, seen = built(llama), tokens(2, 9), []

    def layers(*args: Any) -> list[Any]:
        seen.append(list(warnings.filters))
        return caches.empty_layers(*args)

    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="attention is computed by 'eager'"):
        use_int8_cache(model)
    monkeypatch.setattr(int8_cache, "empty_layers", layers)
    assert kept(model, ids) == {Int8Cache} and seen == [list(warnings.filters)] * 2


@pytest.mark.parametrize("use", [use_float_cache, use_int8_cache])
def test_replicas_of_a_model_keep_what_their_outputs_can_be_joined_of(use: Any) -> None:
    model = built(llama)
    use(model)
    replica = model._replicate_for_data_parallel()
    with torch.no_grad():
        cache = getattr(replica(tokens(2, 9)), str(cache_name(model)))
    assert type(cache) is transformers.DynamicCache


def test_room() -> None:
    room = torch.zeros(2, 3, 10, 4)
    assert has_room(room, room[:, :, :7], 10) and not has_room(room, room[:, :, :7], 11)
    assert not has_room(room, room[:, :, 1:7], 10) and not has_room(room, room[:, :, :7].contiguous(), 10)
    assert not has_room(room, room[:1, :, :7], 10), "of the first sequence alone"
    assert room_for(1) == 65 and room_for(8000) == 9000
