"""What the caches of this package share: layers with spare room, and how a model is made to use such a cache.

transformers' `DynamicCache` copies all keys and values for each new token. The layers here allocate more memory than
they need, and write new tokens behind those that they hold. Everything else (what a cache keeps besides keys and
values, how it is cropped or reordered) is transformers' code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from octavo.errors import OctavoError
from octavo.integrations.language_model import CACHE_NAMES, cache_name

__all__ = [
    "Handle",
    "Room",
    "RoomyLayer",
    "cache_argument",
    "empty_layers",
    "has_room",
    "install_cache",
    "replacement_for",
    "room_for",
]

Make = Callable[[PreTrainedConfig], Cache]
"""An empty cache for a model of this config."""


# -- layers ---------------------------------------------------------------------------------------------------------


def empty_layers(config: PreTrainedConfig, cache: type[Cache]) -> list[Any]:
    """The layers of the cache that a decoder makes for itself. cache: what they are for.

    Raises: OctavoError for an encoder-decoder.
    """
    config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise OctavoError(
            f"{cache.__name__} is for decoders, and {type(config).__name__} is an encoder-decoder's; leave its cache "
            "to the model"
        )
    return DynamicCache(config=config).layers  # type: ignore[no-any-return]


def replacement_for(layer: Any, of_update: Mapping[Any, type]) -> Any:
    """An empty cache layer to take the place of `layer`: of a class of this package for the keys and values, which also
    derives from the class of `layer` for everything else that it keeps.

    of_update: `update` method of a layer of transformers -> the class for layers that have this method. Returns: None
    for a layer with another one.
    """
    if (own := of_update.get(type(layer).update)) is None:
        return None
    new = _blank(own, type(layer))
    vars(new).update(vars(layer))
    return new


def _blank(own: type, cls: type) -> Any:
    return object.__new__(_both(own, cls))  # type: ignore[arg-type]  # mypy takes a class for no key


_CLASSES: dict[tuple[type, type], type] = {}
"""The classes made so far. (Under a compiler functools.cache would warn, and make them anew.)"""


def _both(own: type, cls: type) -> type:
    if (own, cls) not in _CLASSES:
        # Without `_layer_type` transformers does not register the class as the one to make caches from.
        more = {"_layer_type": None, "_made_of": (own, cls), "__reduce_ex__": _reduced}
        _CLASSES[own, cls] = type(f"{own.__name__.removesuffix('Layer')}{cls.__name__}", (own, cls), more)
    return _CLASSES[own, cls]


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """`__reduce_ex__` for copy and pickle: the two classes that the layer's class is made of (it cannot be imported by
    name), and its state without the spare room."""
    state = vars(layer)
    if state.get("_room") is not None:
        state = {**state, "_room": None, "keys": layer.keys.clone(), "values": layer.values.clone()}
    return _blank, layer._made_of, state


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer of full attention, with room behind them."""

    keys: Tensor
    values: Tensor
    _room: Any = None

    def reset(self) -> None:
        super().reset()
        self._room = None


class Room:
    """Memory for the keys and values of a layer, [B, KV, capacity, D] each, with spare room behind those in use.

    Other tensors may be views of this memory: from before a `crop`, or in a copy of the layer. transformers' own cache
    never changes what such views show, so neither may this one. New tokens are therefore written behind all tokens that
    ever were here. Only if nobody else has a view of the memory do they overwrite tokens that were cropped (as in
    assisted generation, which takes wrong guesses back at each step).

    written: how many tokens were ever written here.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.written = 0
        self._own_views = self._views()

    def takes(self, keys: Tensor, values: Tensor, tokens: int) -> bool:
        """Whether this memory can hold `tokens` tokens, the first of which are those in use: `keys` and `values`."""
        if not (has_room(self.keys, keys, tokens) and has_room(self.values, values, tokens)):
            return False
        return keys.shape[2] == self.written or self._views() == [own + 1 for own in self._own_views] != []

    def _views(self) -> list[int]:
        """How many tensors use the memory of keys and that of values, up to a constant; empty if torch cannot tell."""
        count = getattr(torch._C, "_storage_Use_Count", None)  # torch has no public name for it
        return [count(one.untyped_storage()._cdata) for one in (self.keys, self.values)] if count else []


def room_for(tokens: int) -> int:
    """The capacity to allocate for so many tokens: an eighth more, at least 64 more, so that it seldom has to grow."""
    return tokens + max(tokens // 8, 64)


def has_room(room: Tensor, held: Tensor, tokens: int) -> bool:
    """Whether so many tokens fit into `room` [B, KV, capacity, D], and `held` [B, KV, S, D] is still a view of its
    beginning. It is not after transformers replaced it by another tensor, as beam search does."""
    return (
        tokens <= room.shape[2]
        and room.data_ptr() == held.data_ptr()
        and room.stride() == held.stride()
        and room.shape[:2] == held.shape[:2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


# -- models ---------------------------------------------------------------------------------------------------------


def cache_argument(model: PreTrainedModel) -> str:
    """The argument of the model's forward that takes a cache. Raises: OctavoError for a model without one."""
    argument = cache_name(model)
    if argument is None:
        raise OctavoError(f"{type(model).__name__} keeps no key-value cache, for which another could stand in")
    return argument


def install_cache(model: PreTrainedModel, make: Make) -> Handle:
    """From now on the model uses a cache from `make` wherever it would make one of its own: in `generate`, and in a
    forward that is given none, unless `use_cache` is False.

    A cache that the model is given, or told to make by `cache_implementation`, is left alone. After several calls the
    last one counts whose handle was not removed.

    make: can be pickled, so that the model still can.
    Raises: OctavoError for a model without a key-value cache, and what `make` raises.
    """
    argument = cache_argument(model)
    make(model.config)  # raises now
    return Handle(model, make, argument)


class Handle:
    """What `install_cache` returns; `remove()` takes the cache away again.

    Its methods run inside the model, and are copied and pickled with it. Where there are several handles on one model,
    the last one comes first, and passes on the calls that are not for it.
    """

    def __init__(self, model: PreTrainedModel, make: Make, argument: str) -> None:
        self.model, self._make, self._argument = model, make, argument
        self._place = list(inspect.signature(model.forward).parameters).index(argument)
        self._hook = model.register_forward_pre_hook(self._forward, with_kwargs=True, prepend=True)
        self._generate_before: Callable[..., Any] | None = vars(model).get("generate")
        self._is_removed = False
        vars(model)["generate"] = self._generate

    def remove(self) -> None:
        """Let the model make its caches as it did before."""
        self._hook.remove()
        self._is_removed = True
        own = vars(self.model)
        while isinstance(last := getattr(own.get("generate"), "__self__", None), Handle) and last._is_removed:
            del own["generate"]
            if last._generate_before is not None:
                own["generate"] = last._generate_before

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        configs = (given, model.generation_config)  # what the first does not say, the second does
        implementation = _setting("cache_implementation", kwargs, configs)
        if not self._is_removed and implementation in (None, "hybrid"):  # older checkpoints' word for the usual one
            kwargs = self._with_cache(model, configs, kwargs)
        if self._generate_before is not None:
            return self._generate_before(*args, **kwargs)
        return type(model).generate(model, *args, **kwargs)

    def _forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        # The outputs of DataParallel's replicas are joined, and of caches it knows only transformers' own how to be.
        if len(args) > self._place or getattr(model, "_is_replica", False):
            return None
        return args, self._with_cache(model, (model.config.get_text_config(decoder=True),), kwargs)

    def _with_cache(self, model: Any, configs: Iterable[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        if any(kwargs.get(name) is not None for name in CACHE_NAMES) or _setting("use_cache", kwargs, configs) is False:
            return kwargs
        cache = self._make(model.config)
        if _setting("is_assistant", kwargs, configs):
            cache.activate_past_recording()  # tokens that an assistant guessed wrongly are taken back
        return {**kwargs, "use_cache": True, self._argument: cache}


def _setting(name: str, kwargs: Mapping[str, Any], configs: Iterable[Any]) -> Any:
    """The value of `name` in the arguments, or else in the first config that has one; None if there is none."""
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)
