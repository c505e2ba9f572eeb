"""A key-value cache in int8 for transformers' models: half the memory of bf16, and half of what each token reads.

    output = model.generate(**inputs, past_key_values=Int8Cache(model.config))      `cache=` from transformers 5.24 on
    handle = use_int8_cache(model)                                                  wherever the model makes a cache

Each token of a head has a scale of its own, as in int8 attention (`octavo/ops/attention.py`): no token changes the
codes of another, and a text gives the same answers whether it is fed at once or in pieces. Int8 attention would compute
the codes that the cache holds anyway, so its result has the same bits. Float attention multiplies the codes as they are
(`octavo.ops.float_attention_of_codes`).

A layer holds values as int8 [B, KV, S, Dv] and keys as int8 [B, KV, S, D + 8]: for each token its codes, padded to a
multiple of four bytes, then the four bytes of its scale and the four bytes of the scale of its value. Attention reads
all keys before the values, so it then has both scales, and values start at the beginning of cache lines (with the
scales behind the values it took 1.3 x as long). transformers' operations on caches (cropping, picking beams) move whole
tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from octavo import ops
from octavo.errors import OctavoError
from octavo.integrations import attention, float_attention
from octavo.integrations.caches import (
    Handle,
    Room,
    RoomyLayer,
    cache_argument,
    empty_layers,
    install_cache,
    replacement_for,
    room_for,
)
from octavo.integrations.int8_states import Int8States

__all__ = ["Int8Cache", "Int8Layer", "use_int8_cache"]

_SCALE_BYTES = 4


class Int8Cache(Cache):
    """Keys and values as int8 codes with a scale for each token of a head, of a decoder's full and sliding-window
    attention. What a layer keeps beside them, or instead (states of linear attention), stays as it is.

    config: the model's. Warns: where the model computes its attention by a function that is not octavo's, for then
        keys and values are dequantized, all of them for each token.
    Raises: OctavoError for an encoder-decoder, for layers that keep keys and values in a way of their own, and for
        "flex_attention", which is compiled for plain tensors; later, for keys and values that want a gradient.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layers = _int8_layers(config)
        name = config.get_text_config(decoder=True)._attn_implementation
        if name == "flex_attention":
            raise OctavoError(
                "attention is computed by 'flex_attention', which takes no keys and values of an Int8Cache; call "
                "model.set_attn_implementation('sdpa') first, or leave its cache to the model"
            )
        if name not in (attention.NAME, float_attention.NAME):
            warnings.warn(
                f"attention is computed by {name!r}, for which an Int8Cache dequantizes all keys and values at each "
                "token; octavo.integrations.float_attention.use_float_attention(model), or "
                "octavo.integrations.attention.use_int8_attention(model), reads the codes",
                stacklevel=2,
            )
        super().__init__(layers=layers)


def _without_warning(config: PreTrainedConfig) -> Int8Cache:
    """An Int8Cache without the warning of its constructor, which was given when it was installed."""
    cache = object.__new__(Int8Cache)
    Cache.__init__(cache, layers=_int8_layers(config))
    return cache


def _int8_layers(config: PreTrainedConfig) -> list[Any]:
    return [_int8_layer(layer) for layer in empty_layers(config, Int8Cache)]


def _int8_layer(layer: Any) -> Any:
    if not isinstance(layer, DynamicLayer):
        return layer  # no keys
    of_update = {DynamicLayer.update: Int8Layer, DynamicSlidingWindowLayer.update: Int8SlidingWindowLayer}
    if (int8 := replacement_for(layer, of_update)) is None:
        raise OctavoError(
            f"an Int8Cache has no {type(layer).__name__}, which this model's attention keeps; leave its cache to the "
            "model"
        )
    return int8


class Int8Layer(RoomyLayer):
    """The keys and values of a layer of full attention as codes."""

    _room: _Packed | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens. Returns: all keys and all values so far, [B, KV, S, D] each."""
        if torch.compiler.is_compiling():
            return _uncompiled(self, key_states, value_states)
        _refuse_gradients(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*(x.new_empty(0, dtype=torch.int8) for x in (key_states, value_states)))
        before = self.get_seq_length()
        total = before + key_states.shape[2]
        room = self._room
        if room is None or not room.memory.takes(self.keys, self.values, total):
            self._room = room = _Packed.of(key_states, value_states, room_for(total))
            if before:
                room.keys[:, :, :before], room.values[:, :, :before] = self.keys, self.values
        room.put(key_states, value_states, before)
        self.keys, self.values = room.keys.narrow(2, 0, total), room.values.narrow(2, 0, total)
        return room.first(total, key_states.dtype, value_states.dtype)


class Int8SlidingWindowLayer(DynamicSlidingWindowLayer):
    """The keys and values of a layer of sliding-window attention as codes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens. Returns: the keys and values that they attend to, [B, KV, S, D]
        each."""
        if torch.compiler.is_compiling():
            return _uncompiled(self, key_states, value_states)
        _refuse_gradients(key_states, value_states)
        new = _Packed.of(key_states, value_states, key_states.shape[2])
        new.put(key_states, value_states, 0)
        keys, values = super().update(new.keys, new.values)
        return _Packed(keys, values, key_states.shape[3]).first(keys.shape[2], key_states.dtype, value_states.dtype)


class _Packed:
    """The memory layout of codes and scales, see the head of this file.

    keys: int8 [B, KV, S, D rounded up to a multiple of 4, + 8]; codes and both scales are views of it. size: D.
    values: int8 [B, KV, S, Dv].
    """

    def __init__(self, keys: Tensor, values: Tensor, size: int) -> None:
        self.keys, self.values = keys, values
        self.codes = keys[..., :size]
        self.key_scale, self.value_scale = keys[..., -2 * _SCALE_BYTES :].view(torch.float32).split(1, -1)
        self.memory = Room(keys, values)

    @staticmethod
    def of(keys: Tensor, values: Tensor, tokens: int) -> _Packed:
        """Memory for `tokens` tokens of keys [B, KV, any, D] and values [B, KV, any, Dv]."""
        batch, heads, _, size = keys.shape
        width = -(-size // _SCALE_BYTES) * _SCALE_BYTES + 2 * _SCALE_BYTES  # a scale lies where four bytes may
        packed = keys.new_empty((batch, heads, tokens, width), dtype=torch.int8)
        return _Packed(packed, values.new_empty((batch, heads, tokens, values.shape[3]), dtype=torch.int8), size)

    def put(self, keys: Tensor, values: Tensor, at: int) -> None:
        to = (x.narrow(2, at, keys.shape[2]) for x in (self.codes, self.key_scale, self.values, self.value_scale))
        ops.quantize_states(keys, next(to), next(to), are_values=False)
        ops.quantize_states(values, next(to), next(to), are_values=True)
        self.memory.written = at + keys.shape[2]

    def first(self, count: int, key_dtype: torch.dtype, value_dtype: torch.dtype) -> tuple[Int8States, Int8States]:
        return (
            Int8States(self.codes.narrow(2, 0, count), self.key_scale.narrow(2, 0, count), key_dtype),
            Int8States(self.values.narrow(2, 0, count), self.value_scale.narrow(2, 0, count), value_dtype),
        )


@_disable_dynamo  # as torch.compiler.disable, which would load the compiler now
def _uncompiled(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`layer.update(keys, values)` outside of compiled graphs, which cannot write to a tensor through views of other
    dtypes (the scales inside the keys)."""
    return layer.update(keys, values)  # type: ignore[no-any-return]


def _refuse_gradients(key: Tensor, value: Tensor) -> None:
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise OctavoError(
            "a gradient was asked for through an Int8Cache, which is for inference; train with use_cache=False"
        )


def use_int8_cache(model: PreTrainedModel) -> Handle:
    """From now on the model uses an `Int8Cache` wherever it would make a cache of its own: in `generate`, and in a
    forward that is given none, unless `use_cache` is False; see `caches.install_cache`. Float attention ("sdpa") is
    switched to that of this package, which reads the codes.

    Returns: a handle whose `remove()` ends that. Raises: OctavoError for a model that has no such cache.
    """
    cache_argument(model)
    float_attention.use_float_attention(model)
    Int8Cache(model.config)  # warns, once
    return install_cache(model, _without_warning)
