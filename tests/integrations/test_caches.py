"""What both caches of this package have in common."""

from __future__ import annotations

import concurrent.futures
import copy
import inspect
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from torch import Tensor

from octavo import ops
from octavo.ops.attention import value_codes
from tests.integrations.test_int8_cache import built, falcon_h1, in_pieces, mistral
from tests.tiny_models import gemma3, llama, tokens

transformers = pytest.importorskip("transformers")

from transformers.cache_utils import DynamicLayer  # noqa: E402

from octavo.integrations import caches, int8_cache  # noqa: E402
from octavo.integrations.caches import has_room, room_for  # noqa: E402
from octavo.integrations.float_cache import FloatCache, use_float_cache  # noqa: E402
from octavo.integrations.int8_cache import Int8Cache, Int8Layer, use_int8_cache  # noqa: E402
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


MAKE = pytest.mark.parametrize("make", [FloatCache, Int8Cache])
TELLS = pytest.param(
    True, marks=pytest.mark.skipif(not hasattr(torch._C, "_storage_Use_Count"), reason="torch is mute")
)


@MAKE
@pytest.mark.parametrize("model", [llama, mistral, gemma3, falcon_h1])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layers_are_copied_and_pickled(make: Any, model: Callable[..., Any], copied: Callable[[Any], Any]) -> None:
    """Before they hold something, and after: each goes its own way then."""
    if model is falcon_h1 and not hasattr(transformers, "FalconH1Config"):
        pytest.skip("this version of transformers has no Falcon-H1")
    if model is falcon_h1 and copied is copy.copy:
        pytest.skip("a mixer's states are written to, those in transformers' own layers too")
    model, ids, ways = built(model), tokens(2, 9), [tokens(2, 4), tokens(2, 4)]

    def copy_of(cache: Any) -> Any:
        other = make(model.config)
        other.layers = [copied(layer) for layer in cache.layers]
        return other

    caches = [copy_of(make(model.config))]
    in_pieces(model, ids, caches[0], 7)
    caches.append(copy_of(caches[0]))
    assert [type(layer) for layer in caches[1].layers] == [type(layer) for layer in make(model.config).layers]
    expected = [make(model.config) for _ in ways]
    for cache in expected:
        in_pieces(model, ids, cache, 7)
    for piece in range(2):
        for way, own, fresh in zip(ways, caches, expected, strict=True):
            new = way.chunk(2, 1)[piece]
            assert torch.equal(in_pieces(model, new, own), in_pieces(model, new, fresh))


@MAKE
def test_a_pickle_has_no_room(make: Any) -> None:
    cache = make(built(llama).config)
    for number in range(len(cache)):
        cache.update(*torch.randn(2, 2, 2, 100, 16), number)
    held = sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))
    assert held < len(pickle.dumps(cache)) < held + 4000


@MAKE
def test_room_is_given_back_when_a_cache_is_reset(make: Any) -> None:
    cache = make(built(llama).config)
    cache.update(*torch.randn(2, 2, 2, 9, 16), 0)
    room = weakref.ref(cache.layers[0]._room)
    assert room() is not None
    cache.reset()
    assert room() is None


def assert_same_update(ours: Any, theirs: Any, new: Tensor) -> None:
    rounded = [codes * scale for codes, scale in (ops.quantize_per_token(new[0]), value_codes(new[1]))]
    are_codes = isinstance(ours, Int8Layer)
    expected = theirs.update(*(rounded if are_codes else new))
    for one, other in zip(ours.update(*new), expected, strict=True):
        assert torch.equal(one * 1 if are_codes else one, other)


@MAKE
@pytest.mark.parametrize("tells", [TELLS, False])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_whoever_looks_at_tokens_sees_them_as_they_were(
    make: Any, tells: bool, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with transformers' own layers, whatever is done to one, and to copies that share what it holds."""
    if not tells:
        monkeypatch.delattr(torch._C, "_storage_Use_Count", raising=False)
    pairs = [(make(built(llama).config).layers[0], DynamicLayer())]
    looked_at: list[tuple[Tensor, Tensor]] = []
    whats = strategies.sampled_from(["update", "crop", "look", "part", "share", "beams"])
    for what in ["update", *data.draw(strategies.lists(whats, min_size=3, max_size=12)), "update"]:
        ours, theirs = pairs[data.draw(strategies.integers(0, len(pairs) - 1))]
        held = theirs.get_seq_length()
        if what == "update":
            assert_same_update(ours, theirs, torch.randn(2, 2, 2, data.draw(strategies.sampled_from([1, 2, 40])), 16))
        elif what == "share":
            other = type(ours).__new__(type(ours))
            vars(other).update(vars(ours))
            pairs.append((other, copy.copy(theirs)))
        elif held and what == "crop":
            count = data.draw(strategies.integers(1, min(held, 3)))
            ours.crop(-count)
            theirs.crop(-count)
        elif held and what == "beams":
            for layer in (ours, theirs):
                layer.reorder_cache(torch.tensor([1, 0]))
        elif held:
            part = slice(held // 2 if what == "part" else 0, None)
            looked_at += [(one[:, :, part], one[:, :, part].clone()) for one in (ours.keys, ours.values)]
        assert all(torch.equal(one, before) for one, before in looked_at), what


@MAKE
@pytest.mark.parametrize(
    "look",
    [
        lambda layer, states: layer.keys,
        lambda layer, states: layer.values,
        lambda layer, states: layer.keys[0, :, 6:],
        lambda layer, states: layer.values[..., 0].numpy(),
        lambda layer, states: states[0],
        lambda layer, states: states[1],
    ],
)
def test_one_look_at_what_a_cache_held_is_enough(make: Any, look: Callable[..., Any]) -> None:
    layer = make(built(llama).config).layers[0]
    seen = look(layer, layer.update(*torch.randn(2, 2, 2, 9, 16)))
    before = seen * 1  # of codes and a scale the numbers
    layer.crop(-2)
    layer.update(*torch.randn(2, 2, 2, 2, 16))
    assert (seen * 1 == before).all()


@MAKE
def test_tokens_that_come_behind_others_are_not_copied_for_who_looks_at_those(make: Any) -> None:
    cache, seen = make(built(llama).config), []
    for _ in range(90):
        cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
        seen.append(cache.layers[0].keys)
    assert len({keys.data_ptr() for keys in seen}) < 4


@MAKE
@pytest.mark.parametrize("tells", [TELLS])
def test_guesses_that_are_taken_back_at_each_step_are_written_over(make: Any, tells: bool) -> None:
    """As prompt lookup does: 90 tokens stay of 360, in the room that there is for them."""
    cache = make(built(llama).config)
    cache.update(*torch.randn(2, 1, 2, 80, 16), 0)
    places = set()
    for _ in range(90):
        cache.update(*torch.randn(2, 1, 2, 4, 16), 0)
        places.add(cache.layers[0].keys.data_ptr())
        cache.layers[0].crop(-3)
    assert cache.get_seq_length() == 170 and len(places) < 4


def test_room() -> None:
    room = torch.zeros(2, 3, 10, 4)
    assert has_room(room, room[:, :, :7], 10) and not has_room(room, room[:, :, :7], 11)
    assert not has_room(room, room[:, :, 1:7], 10) and not has_room(room, room[:, :, :7].contiguous(), 10)
    assert not has_room(room, room[:1, :, :7], 10), "of the first sequence alone"
    assert room_for(1) == 65 and room_for(8000) == 9000
