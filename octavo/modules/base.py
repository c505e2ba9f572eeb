"""What all int8 layers share: codes and scales as buffers, which no cast touches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import QuantizeError
from octavo.recipe import Scheme
from octavo.stand_ins import kept_attributes

__all__ = ["Codes", "QuantModule", "hold_rest"]


def hold_rest(new: nn.Module, layer: nn.Module) -> None:
    """Let `new` take over the attributes, parameters, buffers and children of the float layer that it lacks: methods
    of its class may use them."""
    for name, value in kept_attributes(layer).items():
        if name not in vars(new):
            setattr(new, name, value)
    for name, parameter in layer._parameters.items():
        if not hasattr(new, name):  # a weight it has, as codes
            new.register_parameter(name, parameter)
    for name, buffer in layer._buffers.items():
        new.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
    for name, child in layer._modules.items():
        if name != "parametrizations" and name not in new._modules:  # what the weight was computed of
            new.add_module(name, child)


Codes = Mapping[str, tuple[Tensor, Tensor]]
"""Parameter name -> (codes int8 [N, ...], scale fp32 [N, 1] or [N, K/g])."""


class QuantModule(nn.Module):
    """Base class of all int8 layers.

    quantized_params: names of the parameters that are int8, as in the float layer.
    scheme: how they were quantized.
    float_dtype: the dtype that they had in the float layer. On disk their scales are stored in it.
    replaces: kind of the float layer ("Linear", ...), for reports and for the checkpoint's config; set by `install`.
    note: why the scheme is not the one that the recipe asked for, or None; set by `install`.
    op_names: names of the ops that `forward` calls, for reports on which backends serve them.
    """

    quantized_params: tuple[str, ...]
    scheme: Scheme
    float_dtype: torch.dtype
    replaces: str
    note: str | None = None
    op_names: tuple[str, ...]
    _float: Tensor

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized_params = tuple(codes)
        self.scheme = scheme
        self.float_dtype = float_dtype
        for name, (weight, scale) in codes.items():
            if weight.dtype != torch.int8 or scale.dtype != torch.float32:
                raise QuantizeError(
                    f"{name}: codes are {weight.dtype} and the scale is {scale.dtype}, expected int8 and fp32"
                )
            self.hold(name, weight, scale)
        if "bias" in layer._parameters:
            self.register_parameter("bias", layer._parameters["bias"])
        self.train(layer.training)

    def _follow_casts(self, device: torch.device) -> None:
        """Add the buffer `_float`, a scalar that `.half()` and `.to(dtype)` cast: its dtype is that of the model."""
        if "_float" not in self._buffers:
            self.register_buffer("_float", torch.full((), torch.nan, dtype=self.float_dtype, device=device), False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `fn` moves and casts. What it would do to codes is tried on an empty tensor first.
        for name, (codes, _) in self.codes().items():
            cast = fn(torch.empty(0, dtype=torch.int8, device=codes.device)).dtype
            if cast != torch.int8:
                raise QuantizeError(
                    f"{type(self).__name__}.{name}: int8 codes would be cast to {cast}, which loses their meaning; "
                    "use .to(dtype) or .half(), which leave them alone, instead of .type(dtype)"
                )
        # A scale goes through `fn` as an int32 view, so that it is moved but never cast: in fp16 or bf16 it would no
        # longer be the scale that the codes were fitted to.
        self._view_scales(torch.int32)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._view_scales(torch.float32)
        self.void_float()
        return self

    def scale_names(self) -> tuple[str, ...]:
        """Names of the buffers that are scales: fp32, whatever the dtype of the model."""
        return tuple(f"{name}_scale" for name in self.quantized_params)

    def _view_scales(self, dtype: torch.dtype) -> None:
        for name in self.scale_names():
            buffers, short = self._place(name)
            scale = buffers[short]
            assert scale is not None
            buffers[short] = scale.view(dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.quantized_params:
            value = state_dict.get(prefix + name)
            if value is not None and value.dtype != torch.int8:
                raise QuantizeError(
                    f"{prefix}{name}: the state dict holds {value.dtype}, expected int8 codes; load float weights "
                    "into the float model and quantize that"
                )
        for name in self.scale_names():
            scale = state_dict.get(prefix + name)
            if scale is not None:  # files hold it in the model's dtype, and `assign=True` would take that over
                state_dict[prefix + name] = scale.float()
        vars(self)["_is_loading"] = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            del vars(self)["_is_loading"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("quantized_params", ()) and not self._can_hold(name, value):
            raise QuantizeError(
                f"{type(self).__name__}.{name}: holds int8 codes, which go with their scales, and a "
                f"{type(value).__name__} was to replace them; tie, fuse or assign weights before quantizing, or load "
                "codes with load_state_dict"
            )
        super().__setattr__(name, value)

    def _can_hold(self, name: str, value: Any) -> bool:
        """Whether `value` may take the place of the codes `name`: others do from a state dict, where their scales come
        along, and anything where there are none yet (on meta, whoever loads them looks at what they are)."""
        codes = self._buffers.get(name)
        if codes is None or codes.is_meta:
            return True
        if not isinstance(value, Tensor) or value.dtype != torch.int8 or value.shape != codes.shape:
            return False
        return "_is_loading" in vars(self) or value.data_ptr() == codes.data_ptr()

    def void_float(self) -> None:
        """Fill `_float` with NaN again: `to_empty` and the like leave arbitrary values in it. In a layer that was built
        on meta and has its codes now, make it where they are."""
        if "_float" in self._buffers:
            device = self.codes_and_scale()[0].device
            if self._float.is_meta and device.type != "meta":
                self._buffers["_float"] = torch.empty((), dtype=self.float_dtype, device=device)
            self._float.fill_(torch.nan)

    def _place(self, name: str) -> tuple[dict[str, Tensor | None], str]:
        """The buffers that hold the codes or the scale `name`, and their name in them."""
        return self._buffers, name

    def hold(self, param: str, weight: Tensor, scale: Tensor) -> None:
        """Make these the codes and the scale of a parameter."""
        buffers, short = self._place(param)
        buffers[short] = weight  # not by register_buffer, which refuses names that a facade has as properties
        buffers[f"{short}_scale"] = scale

    def codes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter name -> (codes int8, scale fp32): the tensors themselves, not copies."""
        return {name: self.codes_and_scale(name) for name in self.quantized_params}

    def codes_and_scale(self, param: str = "weight") -> tuple[Tensor, Tensor]:
        """Codes (int8) and scale (fp32) of one parameter.

        Read from `_buffers`, because the attribute may show something else (`facade.py`), and because a lookup by
        `nn.Module.__getattr__` would take a tenth of a small layer's time.
        """
        codes, scale = self._buffers[param], self._buffers[f"{param}_scale"]
        assert codes is not None and scale is not None
        return codes, scale
