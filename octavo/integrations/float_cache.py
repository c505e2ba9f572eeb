"""A key-value cache in float, with room for tokens to come: transformers' own, without its copying.

    output = model.generate(**inputs, past_key_values=FloatCache(model.config))     `cache=` from transformers 5.24 on
    handle = use_float_cache(model)                                                 wherever the model makes a cache

Keys and values are the same bits. Behind 8000 tokens a token of a small model took 1.3 x as long with transformers'
cache, which copies them all for each token (`python -m bench.run cache`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from octavo.integrations.caches import Handle, Room, RoomyLayer, empty_layers, install_cache, replacement_for, room_for

__all__ = ["FloatCache", "use_float_cache"]


class FloatCache(Cache):
    """Keys and values of a decoder as they are computed. Layers of full attention have room for more behind them; all
    others (sliding windows, states of linear attention) are those of transformers.

    config: the model's. Raises: OctavoError for an encoder-decoder.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layers = empty_layers(config, FloatCache)
        super().__init__(
            layers=[replacement_for(layer, {DynamicLayer.update: FloatLayer}) or layer for layer in layers]
        )


class FloatLayer(RoomyLayer):
    """The keys and values of a layer of full attention as they are computed."""

    _room: Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens. Returns: all keys and all values so far, [B, KV, S, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, before = (key_states, value_states), self.get_seq_length()
        held = (self.keys, self.values) if before else new
        if not _can_be_written(held, new):
            self._room = None
            kept: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return kept
        total = before + key_states.shape[2]
        room = self._room
        if room is None or not room.takes(*held, total):
            self._room = room = _room_like(new, room_for(total))
            if before:
                _write(room, held, 0)
        _write(room, new, before)
        self.keys, self.values = room.keys.narrow(2, 0, total), room.values.narrow(2, 0, total)
        return self.keys, self.values


def _can_be_written(held: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> bool:
    """Whether `new` may be written behind `held`: no compiler or gradient is involved, and shapes, dtypes and devices
    match. Otherwise transformers' `torch.cat` is to answer, or to raise."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in (*held, *new)))
        and all(
            (a.dtype, a.device, a.shape[:2], a.shape[3:]) == (b.dtype, b.device, b.shape[:2], b.shape[3:])
            for a, b in zip(held, new, strict=True)
        )
    )


def _room_like(states: tuple[Tensor, Tensor], tokens: int) -> Room:
    return Room(*(one.new_empty((*one.shape[:2], tokens, one.shape[3])) for one in states))


def _write(room: Room, states: tuple[Tensor, Tensor], at: int) -> None:
    for one, new in zip((room.keys, room.values), states, strict=True):
        one.narrow(2, at, new.shape[2]).copy_(new)
    room.written = at + states[0].shape[2]


def use_float_cache(model: PreTrainedModel) -> Handle:
    """From now on the model keeps a `FloatCache` wherever it would make a cache of its own: in `generate`, and in a
    forward that is given none, unless `use_cache` is False; see `caches.install_cache`.

    Returns: a handle whose `remove()` ends that. Raises: OctavoError for a model that has no such cache.
    """
    return install_cache(model, FloatCache)
