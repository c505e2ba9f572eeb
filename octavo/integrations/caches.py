"""What caches of this package share: they take the place of the one that transformers' models make for themselves.

transformers' `DynamicCache` copies all keys and values for each token that comes. A layer of these has room for more
behind those that it holds: what comes is written there. What else a model's cache keeps, and how it is cropped or
reordered, is transformers' code.
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

__all__ = ["Handle", "Room", "RoomyLayer", "argument_of", "empty_layers", "has_room", "instead", "keep", "room_for"]

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


def instead(layer: Any, of_update: Mapping[Any, type]) -> Any:
    """An empty layer that keeps keys and values as the class says that `of_update` has for the layer's `update`, and
    what else it keeps as `layer` does; None if there is no such class."""
    if (own := of_update.get(type(layer).update)) is None:
        return None
    new = _blank(own, type(layer))
    vars(new).update(vars(layer))
    return new


def _blank(own: type, cls: type) -> Any:
    return object.__new__(_both(own, cls))  # type: ignore[arg-type]  # mypy takes a class for no key


_CLASSES: dict[tuple[type, type], type] = {}
"""That were made. (A compiler would look past functools.cache, with a warning, and make them anew.)"""


def _both(own: type, cls: type) -> type:
    if (own, cls) not in _CLASSES:
        # Else transformers would take it, from now on, for what caches of this type of layer are made of.
        more = {"_layer_type": None, "_made_of": (own, cls), "__reduce_ex__": _reduced}
        _CLASSES[own, cls] = type(f"{own.__name__.removesuffix('Layer')}{cls.__name__}", (own, cls), more)
    return _CLASSES[own, cls]


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """For copies and files: what the layer's class is made of, for it can be imported from nowhere, and what it holds,
    without the room behind that."""
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
    """Memory of a layer for keys and values, [B, KV, more, D] each, which begins with those that it holds.

    Others may look at it, too: at what was there before a `crop`, or through a copy of the layer's attributes.
    transformers' own cache leaves all that as it is. So tokens come behind all that ever were here, and in the place of
    some only if nobody else has a view of the memory, as when guesses are taken back at each step.

    written: how many tokens ever were here.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.written = 0
        self._own_views = self._views()

    def takes(self, keys: Tensor, values: Tensor, tokens: int) -> bool:
        """Whether so many tokens can be here, of which the first are what the layer holds: `keys` and `values`."""
        if not (has_room(self.keys, keys, tokens) and has_room(self.values, values, tokens)):
            return False
        return keys.shape[2] == self.written or self._views() == [own + 1 for own in self._own_views] != []

    def _views(self) -> list[int]:
        """How many tensors lie in the memory of keys, and of values, give or take what is the same at any time; empty
        where torch does not tell."""
        count = getattr(torch._C, "_storage_Use_Count", None)  # torch has no public name for it
        return [count(one.untyped_storage()._cdata) for one in (self.keys, self.values)] if count else []


def room_for(tokens: int) -> int:
    """How many tokens there is to be room for, so that room is seldom made: an eighth more, and at least 64."""
    return tokens + max(tokens // 8, 64)


def has_room(room: Tensor, held: Tensor, tokens: int) -> bool:
    """Whether so many tokens fit into `room` [B, KV, more, D], which begins with `held` [B, KV, S, D] and may be
    written to. It does not begin with what transformers puts in the place of what is held, as it does for beams."""
    return (
        tokens <= room.shape[2]
        and room.data_ptr() == held.data_ptr()
        and room.stride() == held.stride()
        and room.shape[:2] == held.shape[:2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


# -- models ---------------------------------------------------------------------------------------------------------


def argument_of(model: PreTrainedModel) -> str:
    """The argument of the model's forward that takes a cache. Raises: OctavoError for a model without one."""
    argument = cache_name(model)
    if argument is None:
        raise OctavoError(f"{type(model).__name__} keeps no key-value cache, for which another could stand in")
    return argument


def keep(model: PreTrainedModel, make: Make) -> Handle:
    """From now on the model keeps what `make` gives wherever it would make a cache of its own: in `generate`, and in a
    forward that is given none, unless `use_cache` is False. A cache that it is given, or told to make by
    `cache_implementation`, stays what it is. Of several such calls the last one holds whose handle was not removed.

    make: something that can be pickled, as the model then can. Raises: OctavoError for a model without a key-value
        cache, and what `make` raises.
    """
    argument = argument_of(model)
    make(model.config)  # raises now
    return Handle(model, make, argument)


class Handle:
    """Of a model that keeps a cache of this package, until `remove()`.

    What runs in the model are its methods, which are copied and pickled with the model. Where there are several, each
    passes on what it was not asked for: the last one comes first.
    """

    def __init__(self, model: PreTrainedModel, make: Make, argument: str) -> None:
        self.model, self._make, self._argument = model, make, argument
        self._place = list(inspect.signature(model.forward).parameters).index(argument)
        self._hook = model.register_forward_pre_hook(self._forward, with_kwargs=True, prepend=True)
        self._generate_before: Callable[..., Any] | None = vars(model).get("generate")
        self._is_removed = False
        vars(model)["generate"] = self._generate

    def remove(self) -> None:
        """The model's caches are what they would be had it not been told to keep this one."""
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
        implementation = _told("cache_implementation", kwargs, configs)
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
        if any(kwargs.get(name) is not None for name in CACHE_NAMES) or _told("use_cache", kwargs, configs) is False:
            return kwargs
        cache = self._make(model.config)
        if _told("is_assistant", kwargs, configs):
            cache.activate_past_recording()  # tokens that an assistant guessed wrongly are taken back
        return {**kwargs, "use_cache": True, self._argument: cache}


def _told(name: str, kwargs: Mapping[str, Any], configs: Iterable[Any]) -> Any:
    """What arguments say of `name`, or the first of the configs that says anything; None if nothing does."""
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)
