"""Make products that other code computes with a layer's weight look like calls of the layer, so that its hooks see
them.

    qkv = F.linear(x, self.qkv.weight, bias)                nothing calls self.qkv, and its hooks would not run
    nn.MultiheadAttention                                   torch's own code does so with its out_proj

`calibrate` and `compare` observe layers by hooks. While `products_as_calls` is open, such a product runs inside a call
of the layer that has the product's input and output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from octavo.model_code.weight_readers import used_in_products
from octavo.modules.int8_weight import ATTENTION, PRODUCTS, Int8Weight, shows_int8_weight

__all__ = ["products_as_calls"]


@contextlib.contextmanager
def products_as_calls(model: Any) -> Iterator[None]:
    """While open, products with weights of layers of `model`, float or int8, run as calls of these layers. A `model`
    that is not a module is left alone."""
    names = used_in_products(model) if isinstance(model, nn.Module) else set()
    modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
    layers = [layer for name, layer in modules if name in names or shows_int8_weight(layer)]
    layers += [layer.out_proj for _, layer in modules if isinstance(layer, nn.MultiheadAttention)]
    if not layers:
        yield
        return
    mode = _AsCalls({id(layer._parameters.get("weight", layer)): layer for layer in layers})
    hooks = [layer.register_forward_pre_hook(mode.begin) for layer in layers]
    hooks += [layer.register_forward_hook(mode.end, always_call=True) for layer in layers]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _AsCalls(TorchFunctionMode):
    """Redirects products to layers. layers: id of a float weight, or of an int8 layer -> the layer."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers
        self._running: set[int] = set()

    def begin(self, layer: nn.Module, inputs: Any) -> None:
        self._running.add(id(layer))

    def end(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._running.discard(id(layer))

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if function is F.multi_head_attention_forward:
            with self:  # a mode is off inside its own `__torch_function__`
                return ATTENTION(*args, **named)
        layer = self._layer(function, args, named)
        if layer is None:
            return function(*args, **named)
        x = args[0] if args else named.pop("input")
        vars(layer)["forward"] = lambda input: function(input, *args[1:], **named)
        try:
            return layer(x)
        finally:
            del vars(layer)["forward"]

    def _layer(self, function: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> nn.Module | None:
        """The layer whose weight `function` multiplies with, unless that layer is running and does so itself."""
        if function not in PRODUCTS:
            return None
        weight = args[1] if len(args) > 1 else named.get("weight")
        layer = self._layers.get(id(weight.layer if isinstance(weight, Int8Weight) else weight))
        return None if id(layer) in self._running else layer
