"""Convolutions and transposed convolutions of 1 to 3 dimensions with int8 weights and float inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import ops
from octavo.computed_weights import pads_same_upper, same_upper
from octavo.errors import QuantizeError
from octavo.modules.base import Codes, QuantModule
from octavo.recipe import Scheme

__all__ = ["QuantConv", "QuantConvTranspose"]


class QuantConv(QuantModule):
    """Convolution with int8 weights, one scale for each output channel.

    weight: int8 [N, C/groups, *k]. weight_scale: fp32 [N, 1]. bias: [N] float or None.
    padding: as in torch, or "same_upper" for a class that pads so (`computed_weights.same_upper`).
    """

    op_names: tuple[str, ...] = ("w8a16_conv",)
    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    output_padding: tuple[int, ...]
    _explicit_padding: list[int]

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
            "output_padding",
        ):  # fmt: skip
            setattr(self, name, getattr(layer, name))
        if pads_same_upper(layer):
            self.padding = "same_upper"
        self._explicit_padding = getattr(layer, "_reversed_padding_repeated_twice", [])

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, *D] or [C, *D] float -> [B, N, *D'] or [N, *D'] of the same dtype."""
        if self.padding_mode == "zeros":
            return self.product(input, self.bias, self.stride, self.padding, self.dilation, self.groups)
        batched, x = self._batched(input)
        x = F.pad(x, self._explicit_padding, mode=self.padding_mode)
        y = self.product(x, self.bias, self.stride, 0, self.dilation, self.groups)
        return y if batched else y.squeeze(0)

    def product(
        self,
        input: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """The convolution of `input` with the layer's weight, with a bias [N], stride, padding, dilation and groups
        that need not be the layer's: [B, C, *D] or [C, *D] float -> [B, N, *D'] or [N, *D'] of the same dtype."""
        batched, x = self._batched(input)
        stride, dilation = self._each(stride), self._each(dilation)
        if isinstance(padding, str):  # torch's "same", which is for strides of 1, TensorFlow's, or "valid"
            if padding != "valid":
                x = F.pad(x, same_upper(x.shape[2:], self.kernel_size, stride, dilation))
            padding = 0
        y = ops.w8a16_conv(x, *self.codes_and_scale(), bias, stride, self._each(padding), dilation, groups)
        return y if batched else y.squeeze(0)

    def _each(self, sizes: int | Sequence[int]) -> Sequence[int]:
        """One size per dimension; torch's functions also take one number for all dimensions."""
        each = [sizes] if isinstance(sizes, int) else sizes
        return each if len(each) == len(self.kernel_size) else [*each] * len(self.kernel_size)

    def _batched(self, input: Tensor) -> tuple[bool, Tensor]:
        dims = len(self.kernel_size) + 2
        if input.dim() not in (dims - 1, dims) or input.shape[-dims + 1] != self.in_channels:
            raise QuantizeError(
                f"input: shape is {list(input.shape)}, expected [B, {self.in_channels}, *D] or "
                f"[{self.in_channels}, *D] with {dims - 2} dimensions in D"
            )
        return input.dim() == dims, input if input.dim() == dims else input.unsqueeze(0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.kernel_size)}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"padding_mode={self.padding_mode!r}, bias={self.bias is not None}, {self.scheme}"
        )


class QuantConvTranspose(QuantConv):
    """Transposed convolution with int8 weights, one scale for each output channel.

    weight: int8 [N, C/groups, *k], output channels first (torch's float layout is [C, N/groups, *k]).
    weight_scale: fp32 [N, 1]. bias: [N] float or None.
    """

    op_names: tuple[str, ...] = ("w8a16_conv_transpose",)
    padding: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C, *D] or [C, *D] float -> [B, N, *D'] or [N, *D'] of the same dtype; `output_size` as in nn."""
        batched, x = self._batched(input)
        # torch's own method; it uses only sizes of the layer, which are attributes here under the same names.
        output_padding = nn.modules.conv._ConvTransposeNd._output_padding(
            self,  # type: ignore[arg-type]
            input, output_size, list(self.stride), list(self.padding), list(self.kernel_size), len(self.kernel_size),
            list(self.dilation),
        )  # fmt: skip
        y = ops.w8a16_conv_transpose(
            x, *self.codes_and_scale(), self.bias, self.stride, self.padding, self.dilation, output_padding,
            self.groups,
        )  # fmt: skip
        return y if batched else y.squeeze(0)
