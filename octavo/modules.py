"""The int8 layers that stand in for float ones. `print(model)` shows them; a `forward` is one op call.

    QuantLinear              nn.Linear and transformers' Conv1D (its weight is stored transposed: [N, K] here)
    DynamicQuantLinear       the same with int8 inputs, their scale that of the input at hand
    StaticQuantLinear        the same with one scale for all inputs, chosen by calibration
    QuantConv                nn.Conv1d/2d/3d
    QuantConvTranspose       nn.ConvTranspose1d/2d/3d
    QuantEmbedding           nn.Embedding
    QuantExperts             a stack of experts, their weights 3-D: [E, N, K] here
    QuantMultiheadAttention  nn.MultiheadAttention: its packed input projections; its out_proj is a QuantLinear
    TiedQuantLinear,         a layer whose weight is another's: it holds no codes of its own, in memory or on disk
    TiedQuantEmbedding

A float parameter `P` becomes two buffers, `P` (int8 codes, output channels first) and `P_scale` (fp32). They keep
their dtypes under `.half()`, `.to(dtype)` and autocast. A bias stays the float parameter that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import ops
from octavo.errors import QuantizeError
from octavo.experts import ExpertsSpec, argument_names, arguments, chosen_experts, registered, spec_of
from octavo.inputs import SharedInput
from octavo.primitives import dequantize
from octavo.recipe import Scheme
from octavo.stand_ins import kept_attributes

__all__ = [
    "DynamicQuantLinear",
    "QuantConv",
    "QuantConvTranspose",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantModule",
    "QuantMultiheadAttention",
    "StaticQuantLinear",
    "TiedQuantEmbedding",
    "TiedQuantLinear",
]

Codes = Mapping[str, tuple[Tensor, Tensor]]
"""Parameter name -> (codes int8 [N, ...], scale fp32 [N, 1] or [N, K/g])."""


class QuantModule(nn.Module):
    """What all int8 layers share.

    quantized_params: the parameters that are int8 here, by the names that they had in the float layer.
    scheme: how they were quantized.
    float_dtype: the dtype that they had, in which their scales are stored on disk.
    replaces: kind of the float layer ("Linear", ...), for reports and for the checkpoint's config; set by the swap.
    note: why the scheme is not the one that the recipe asked for, or None; set by the swap.
    op_names: names of the ops that its `forward` calls, for reports on who serves them.
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
            self._buffers[name] = weight  # not register_buffer: a facade has an attribute of that name
            self._buffers[f"{name}_scale"] = scale
        if "bias" in layer._parameters:
            self.register_parameter("bias", layer._parameters["bias"])
        self.train(layer.training)

    def _follow_casts(self, device: torch.device) -> None:
        """Have a `_float` that `.half()` and `.to(dtype)` cast along with the rest of the model."""
        if "_float" not in self._buffers:
            self.register_buffer("_float", torch.full((), torch.nan, dtype=self.float_dtype, device=device), False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `fn` moves and casts. An empty tensor of codes tells what it would do to them, before it does it.
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
            scale = self._buffers[name]
            assert scale is not None
            self._buffers[name] = scale.view(dtype)

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
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def void_float(self) -> None:
        """Fill `_float` with NaN, for what makes buffers anew, as `to_empty` does, leaves anything in it."""
        if "_float" in self._buffers:
            self._float.fill_(torch.nan)

    def _hold_rest(self, layer: nn.Module, params: Collection[str]) -> None:
        """Hold what the float layer holds besides `params`, and this one does not: what its own code may ask for."""
        for name, value in kept_attributes(layer).items():
            if name not in vars(self):
                setattr(self, name, value)
        for name, parameter in layer._parameters.items():
            if name not in params and not hasattr(self, name):
                self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
        for name, child in layer._modules.items():
            if name != "parametrizations":  # what the weight was computed of
                self.add_module(name, child)

    def codes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter name -> (codes int8, scale fp32): the tensors themselves, not copies."""
        return {name: self.codes_and_scale(name) for name in self.quantized_params}

    def codes_and_scale(self, param: str = "weight") -> tuple[Tensor, Tensor]:
        """Of one parameter. An attribute may show something else (`facade.py`), and to look it up by
        `nn.Module.__getattr__` would be a tenth of a small layer's time."""
        codes, scale = self._buffers[param], self._buffers[f"{param}_scale"]
        assert codes is not None and scale is not None
        return codes, scale


class QuantLinear(QuantModule):
    """y = x W^T + b with int8 W.

    weight: int8 [N, K]. weight_scale: fp32 [N, 1] or [N, K/g]. bias: [N] float or None.
    fake: compute in fp32 with the dequantized weight (and input) instead of with int8 codes, to study what int8 does.
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
        self.out_features, self.in_features = self.codes_and_scale()[0].shape

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] float -> [..., N] of the same dtype."""
        if self.fake:
            return self._simulate(input, input.float())
        return ops.w8a16_linear(input, *self.codes_and_scale(), self.bias)

    def _simulate(self, input: Tensor, as_quantized: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(as_quantized, dequantize(*self.codes_and_scale()), bias).to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}{', fake' if self.fake else ''}"
        )


class DynamicQuantLinear(QuantLinear):
    """y = x W^T + b with int8 W and int8 x, whose scale is found when x is there: per_token or per_tensor.

    shared_input: by which layers that are fed the same tensor quantize it once; the swap gives a model's layers one.
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
        """What makes two layers quantize an input alike."""
        return self.scheme.input

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] float -> [..., N] of the same dtype (of autocast's, inside autocast)."""
        if self.fake:
            codes, scale = self.quantize_input(input)
            rounded = dequantize(codes, scale)
            return self._simulate(input, input.float() + (rounded - input.float()).detach())
        x = ops.autocast(input)
        weight, weight_scale = self.codes_and_scale()
        if (at_once := self._at_once(x, weight, weight_scale)) is not None:
            return at_once
        codes, scale = self.shared_input.quantized(
            input, lambda: (self._key(), x.dtype), self, lambda _: self.quantize_input(x)
        )
        y = ops.w8a8_linear(codes, scale, weight, weight_scale, self.bias, x.dtype)
        return ops.straight_through(y, input, weight, weight_scale)

    def _at_once(self, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor | None:
        """y where one call quantizes x and multiplies, which is faster for few rows than sharing their codes."""
        assert self.scheme.input is not None
        if self.scheme.input.granularity != "per_token":
            return None
        return ops.w8a8_linear_at_once(x, None, weight, weight_scale, self.bias)


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

    def _at_once(self, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor | None:
        return ops.w8a8_linear_at_once(x, self.input_scale, weight, weight_scale, self.bias)

    def _key(self) -> object:
        if self.input_scale.is_meta:
            return None  # there are no values
        if self._scale_value is None:
            self._scale_value = self.input_scale.item()
        return self._scale_value

    def set_input_scale(self, scale: Tensor) -> None:
        """Take over a calibrated scale, fp32 [1], positive and finite."""
        if scale.shape != (1,) or scale.dtype != torch.float32:
            raise QuantizeError(f"input_scale: is {scale.dtype} {list(scale.shape)}, expected fp32 [1]")
        if not 0 < scale.item() < float("inf"):
            raise QuantizeError(f"input_scale: is {scale.item()}, expected a positive, finite number")
        self.input_scale = scale.to(self.weight_scale.device)
        self._scale_value = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._scale_value = None
        super()._load_from_state_dict(*args, **kwargs)


class QuantEmbedding(QuantModule):
    """Lookup in an int8 table; only the rows looked up are dequantized.

    weight: int8 [V, H]. weight_scale: fp32 [V, 1].
    """

    op_names: tuple[str, ...] = ("w8a16_embedding",)
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        self.num_embeddings, self.embedding_dim = self.codes_and_scale()[0].shape
        self.padding_idx = layer.padding_idx
        self._follow_casts(self.codes_and_scale()[0].device)

    def forward(self, input: Tensor) -> Tensor:
        """[...] int -> [..., H] of the dtype that the model was cast to."""
        return ops.w8a16_embedding(input, *self.codes_and_scale(), self._float.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


class _Tied:
    """Takes codes and scale from the layer that owns them, so that the two share one table wherever they are moved."""

    _owner: tuple[QuantModule]  # in a tuple, so that the owner is not registered as a submodule

    @property
    def weight(self) -> Tensor:
        return self.codes_and_scale()[0]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # transformers' tie_weights assigns the owner's table to those that share it; that is what is so already.
        shown: Any = self._owner[0].weight
        if (value.shape, value.data_ptr()) != (shown.shape, shown.data_ptr()):
            raise QuantizeError(f"this {type(self).__name__} shares the table of another layer; assign to that one")

    @property
    def weight_scale(self) -> Tensor:
        return self.codes_and_scale()[1]

    def codes_and_scale(self, param: str = "weight") -> tuple[Tensor, Tensor]:
        return self._owner[0].codes_and_scale(param)


class TiedQuantLinear(_Tied, QuantLinear):  # type: ignore[misc, override]  # read-only: they are the owner's
    """A QuantLinear (such as an output head) whose weight is another layer's."""

    def __init__(self, layer: nn.Module, owner: QuantModule) -> None:
        self._owner = (owner,)
        QuantModule.__init__(self, layer, {}, owner.scheme, owner.float_dtype)
        self.out_features, self.in_features = self.codes_and_scale()[0].shape


class TiedQuantEmbedding(_Tied, QuantEmbedding):  # type: ignore[misc, override]
    """A QuantEmbedding whose table is another layer's."""

    def __init__(self, layer: nn.Module, owner: QuantModule) -> None:
        self._owner = (owner,)
        QuantEmbedding.__init__(self, layer, {}, owner.scheme, owner.float_dtype)


class QuantConv(QuantModule):
    """Convolution with int8 weights, one scale for each output channel.

    weight: int8 [N, C/groups, *k]. weight_scale: fp32 [N, 1]. bias: [N] float or None.
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
        self._explicit_padding = getattr(layer, "_reversed_padding_repeated_twice", [])

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, *D] or [C, *D] float -> [B, N, *D'] or [N, *D'] of the same dtype."""
        batched, x = self._batched(input)
        padding: Sequence[int] = [0] * len(self.stride)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._explicit_padding, mode=self.padding_mode)
        elif isinstance(self.padding, str):  # "same" may pad one side more than the other; "valid" pads nothing
            x = F.pad(x, self._explicit_padding)
        else:
            padding = self.padding
        y = ops.w8a16_conv(x, *self.codes_and_scale(), self.bias, self.stride, padding, self.dilation, self.groups)
        return y if batched else y.squeeze(0)

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
        # It uses nothing but the layer's geometry, which has the same names here.
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


class QuantExperts(QuantModule):
    """A stack of experts with int8 weights; a token's rows are sorted by expert, and experts without rows not touched.

    Each up and down weight of the float layer: int8 [E, N, K], output channels before input channels, with a scale
    fp32 [E, N, 1]. Biases, activation, norm and settings are the float layer's; so is the gate between the projections.
    """

    spec: ExpertsSpec
    source_class: type[nn.Module]
    _names: tuple[str, ...]

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        spec = spec_of(layer)
        assert spec is not None
        self.op_names = (
            ("w8a16_experts_linear",) if scheme.input is None else ("quantize_per_token", "w8a8_experts_linear")
        )
        self.spec = spec
        self.source_class = type(layer)
        self._hold_rest(layer, codes)
        self._names = argument_names(type(layer))

    def __getstate__(self) -> dict[str, Any]:
        """Without what `register_experts` was told: a gate may be a lambda, which cannot be pickled."""
        state = dict(vars(self))
        if registered(self.source_class) is self.spec:
            del state["spec"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "spec" not in state:
            spec = registered(self.source_class)
            if spec is None:
                raise QuantizeError(
                    f"{self.source_class.__name__} is not registered here, as it was where this model was pickled; "
                    "call octavo.register_experts for it first"
                )
            self.spec = spec

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the float layer's: see `octavo.experts.Routing`. Raises: QuantizeError if the experts are no integers."""
        x, *routing = arguments(self._names, args, kwargs)
        experts = self.codes_and_scale(self.spec.down)[0].shape[0]
        if self.spec.routing == "sorted":
            per_expert = x.shape[0] // experts
            ends = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device) * per_expert
            return self._run(x, torch.arange(len(x), device=x.device), ends)
        index = chosen_experts(self.source_class, self.spec, routing)
        top_k = index.shape[-1]
        expert, order = index.reshape(-1).sort(stable=True)
        # What belongs to no expert sorts behind all.
        each = torch.arange(experts, dtype=expert.dtype, device=x.device)
        y = self._run(x, order // top_k, torch.searchsorted(expert, each, right=True, out_int32=True))
        by_token = torch.empty_like(y).index_copy_(0, order, y).view(*index.shape, y.shape[-1])
        if self.spec.routing == "each":
            return by_token
        wide = torch.promote_types(y.dtype, torch.float32)
        weighted = by_token.to(wide) * routing[1].unsqueeze(-1).to(wide)
        return weighted.sum(-2).to(x.dtype)

    def _run(self, x: Tensor, token: Tensor, ends: Tensor) -> Tensor:
        """Rows x[token] [S, H], sorted by expert, through their experts: [S, H]."""
        h = [self._project(x, name, self.spec.up_bias, ends, token) for name in self.spec.up]
        gated = self.spec.gate(self, h[0] if len(h) == 1 else torch.cat(h, -1))
        y = self._project(gated, self.spec.down, self.spec.down_bias, ends, None)
        return y if self.spec.norm is None else getattr(self, self.spec.norm)(y)

    def _project(self, x: Tensor, name: str, bias_name: str | None, ends: Tensor, token: Tensor | None) -> Tensor:
        weight, scale = self.codes_and_scale(name)
        bias = None if bias_name is None else getattr(self, bias_name)
        if self.scheme.input is None:
            return ops.w8a16_experts_linear(x if token is None else x[token], ends, weight, scale, bias)
        cast = ops.autocast(x)
        codes, x_scale = ops.quantize_per_token(cast)  # before they are gathered: a token's rows are all the same
        if token is not None:
            codes, x_scale = codes[token], x_scale[token]
        y = ops.w8a8_experts_linear(codes, x_scale, ends, weight, scale, bias, cast.dtype)
        # Its rows in float are gathered for a gradient only.
        return ops.straight_through(y, x[token] if token is not None and x.requires_grad else x, weight, scale, ends)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(codes.shape)}" for name, (codes, _) in self.codes().items())
        return f"{self.source_class.__name__}, {shapes}, {self.scheme}"


class QuantMultiheadAttention(QuantModule):
    """nn.MultiheadAttention with int8 projections; the attention itself is torch's, in float.

    in_proj_weight: int8 [3E, E] (or q_proj_weight [E, E], k_proj_weight [E, kdim], v_proj_weight [E, vdim]), each
    with `*_scale` fp32 [N, 1] or [N, K/g]. in_proj_bias: [3E] float or None. out_proj: any layer E -> E.
    """

    op_names: tuple[str, ...] = ("w8a16_linear",)
    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    out_proj: nn.Module

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(layer, name))
        # torch's fused encoder path reads the float weights; it asks for this attribute first.
        self._qkv_same_embed_dim = False
        for name in ("in_proj_bias", "bias_k", "bias_v", "out_proj"):
            setattr(self, name, getattr(layer, name))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: query [B, L, E], key [B, S, kdim], value [B, S, vdim] if batch_first."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(q, key_padding_mask, attn_mask, is_causal)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1)], dim=1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:  # the appended bias and zero positions are open to all queries
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)  # scaled first, as fp16 may not hold the product
            weights = torch.softmax(logits if mask is None else logits + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        codes = list(self.codes().values())
        if len(codes) == 1:
            weight, scale = codes[0]
            if query is key and key is value:
                q, k, v = ops.w8a16_linear(query, weight, scale, self.in_proj_bias).chunk(3, dim=-1)
                return q, k, v
            codes = list(zip(weight.chunk(3), scale.chunk(3), strict=True))
        q, k, v = (
            ops.w8a16_linear(x, weight, scale, bias)
            for x, (weight, scale), bias in zip((query, key, value), codes, biases, strict=True)
        )
        return q, k, v

    def _mask(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """The two masks as one to be added to the logits: broadcastable to [B, heads, L, S], or None."""
        if is_causal and attn_mask is None:
            raise QuantizeError("is_causal=True is a hint about attn_mask, which is None; pass the causal attn_mask")
        attn = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype)
        if attn is not None and attn.dim() == 3:
            attn = attn.unflatten(0, (q.shape[0], self.num_heads))
        padding = F._canonical_mask(key_padding_mask, "key_padding_mask", None, "", q.dtype)
        if padding is None:
            return attn
        padding = padding[:, None, None, :]
        return padding if attn is None else attn + padding

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.scheme}"
