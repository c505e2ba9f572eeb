"""Linear layers with int8 weights and float inputs, or int8 inputs with dynamic or static scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import ops
from octavo.errors import QuantizeError
from octavo.modules.base import Codes, QuantModule
from octavo.modules.shared_input import SharedInput
from octavo.primitives import dequantize
from octavo.recipe import Scheme

__all__ = ["DynamicQuantLinear", "QuantLinear", "StaticQuantLinear", "linear_per_token"]


def linear_per_token(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b with int8 W, and x quantized per token: [..., K] float -> [..., N] of x's dtype (inside autocast,
    of its dtype).

    weight: int8 [N, K]. weight_scale: fp32 [N, 1]. bias: [N] float or None.
    """
    x = ops.autocast(x)
    y = ops.w8a8_linear(*ops.quantize_per_token(x), weight, weight_scale, bias, x.dtype)
    return ops.straight_through(y, x, weight, weight_scale)


class QuantLinear(QuantModule):
    """y = x W^T + b with int8 W.

    weight: int8 [N, K]. weight_scale: fp32 [N, 1] or [N, K/g]. bias: [N] float or None.
    fake: compute in fp32 with the dequantized weight (and input) instead of the codes, to study the effect of rounding.
    """

    op_names: tuple[str, ...] = ("w8a16_linear",)
    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    fake: bool = False

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        # A class that is recognized by what it computes may have no attribute `bias`.
        self.register_parameter("bias", layer._parameters.get("bias"))
        self.out_features, self.in_features = self.codes_and_scale()[0].shape

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] float -> [..., N] of the same dtype (of autocast's, inside autocast)."""
        return self.product(input, self.bias)

    def product(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `forward`, with another bias, [N] float or None."""
        if self.fake:
            return self._simulate(input, input.float(), bias)
        return ops.w8a16_linear(input, *self.codes_and_scale(), bias)

    def _simulate(self, input: Tensor, as_quantized: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.float()
        return F.linear(as_quantized, dequantize(*self.codes_and_scale()), bias).to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}{', fake' if self.fake else ''}"
        )


class DynamicQuantLinear(QuantLinear):
    """y = x W^T + b with int8 W and int8 x, with a scale computed from each x: per_token or per_tensor.

    shared_input: lets layers that are fed the same tensor quantize it once; `install` gives all layers of a model one.
    """

    shared_input: SharedInput

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        assert scheme.input is not None
        self.op_names = (f"quantize_{scheme.input.granularity}", "w8a8_linear")
        self.shared_input = SharedInput()

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., K] of x [..., K], and their scale: fp32 [..., 1] or [1]."""
        assert self.scheme.input is not None
        if self.scheme.input.granularity == "per_token":
            return ops.quantize_per_token(x)
        return ops.quantize_per_tensor(x)

    def _key(self) -> object:
        """Layers with equal keys get the same codes for the same input."""
        return self.scheme.input

    def product(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.fake:
            codes, scale = self.quantize_input(input)
            rounded = dequantize(codes, scale)
            return self._simulate(input, input.float() + (rounded - input.float()).detach(), bias)
        x = ops.autocast(input)
        weight, weight_scale = self.codes_and_scale()
        if (at_once := self._at_once(x, weight, weight_scale, bias)) is not None:
            return at_once
        codes, scale = self.shared_input.quantized(
            input, lambda: (self._key(), x.dtype), self, lambda _: self.quantize_input(x)
        )
        y = ops.w8a8_linear(codes, scale, weight, weight_scale, bias, x.dtype)
        return ops.straight_through(y, input, weight, weight_scale)

    def _at_once(self, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
        """y, if one call can quantize x and multiply (faster for few rows than to share the codes of x); else None."""
        assert self.scheme.input is not None
        if self.scheme.input.granularity != "per_token":
            return None
        return ops.w8a8_linear_at_once(x, None, weight, weight_scale, bias)


class StaticQuantLinear(DynamicQuantLinear):
    """y = x W^T + b with int8 W and int8 x, whose scale was chosen by calibration.

    input_scale: fp32 [1].
    """

    input_scale: Tensor
    _scale_value: float | None

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        self.op_names = ("quantize_static", "w8a8_linear")
        self.register_buffer("input_scale", torch.ones(1, device=self.weight_scale.device))
        self._scale_value = None

    def scale_names(self) -> tuple[str, ...]:
        return (*super().scale_names(), "input_scale")

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.quantize_static(x, self.input_scale), self.input_scale

    def _at_once(self, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
        return ops.w8a8_linear_at_once(x, self.input_scale, weight, weight_scale, bias)

    def _key(self) -> object:
        if self.input_scale.is_meta:
            return None  # a scale on `meta` has no value
        if self._scale_value is None:
            self._scale_value = self.input_scale.item()
        return self._scale_value

    def set_input_scale(self, scale: Tensor) -> None:
        """Set the calibrated scale. scale: fp32 [1], positive and finite. Raises: QuantizeError for any other."""
        if scale.shape != (1,) or scale.dtype != torch.float32:
            raise QuantizeError(f"input_scale: is {scale.dtype} {list(scale.shape)}, expected fp32 [1]")
        if not 0 < scale.item() < float("inf"):
            raise QuantizeError(f"input_scale: is {scale.item()}, expected a positive, finite number")
        self.input_scale = scale.to(self.weight_scale.device)
        self._scale_value = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._scale_value = None
        super()._load_from_state_dict(*args, **kwargs)
