"""The schemas of the ops, registered with torch along with their reference: `torch.ops.octavo.NAME`.

`reference.py` and `attention.py` answer on every device, and under the namespace `octavo_reference` always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo.ops import attention, reference

__all__ = ["OPS", "library", "reference_of"]

_CONVOLUTION = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, {output_padding}SymInt groups) -> Tensor"
)

OPS: dict[str, str] = {
    "w8a16_linear": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    "w8a16_conv": _CONVOLUTION.format(output_padding=""),
    "w8a16_conv_transpose": _CONVOLUTION.format(output_padding="SymInt[] output_padding, "),
    "w8a16_embedding": "(Tensor indices, Tensor weight, Tensor weight_scale, ScalarType dtype) -> Tensor",
    "quantize_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "quantize_per_tensor": "(Tensor x) -> (Tensor, Tensor)",
    "quantize_static": "(Tensor x, Tensor input_scale) -> Tensor",
    "quantize_weight": "(Tensor weight) -> (Tensor, Tensor)",
    "w8a16_experts_linear": "(Tensor x, Tensor ends, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    "w8a8_experts_linear": (
        "(Tensor x, Tensor x_scale, Tensor ends, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) "
        "-> Tensor"
    ),
    "w8a8_linear": (
        "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor"
    ),
    "int8_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling, float? softcap=None) -> Tensor"
    ),
    "float_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling, bool is_causal) -> Tensor"
    ),
    "int8_attention_of_codes": (
        "(Tensor query, Tensor key, Tensor key_scale, Tensor value, Tensor value_scale, Tensor? mask, float scaling, "
        "float? softcap=None) -> Tensor"
    ),
    "float_attention_of_codes": (
        "(Tensor query, Tensor key, Tensor key_scale, Tensor value, Tensor value_scale, Tensor? mask, float scaling, "
        "bool is_causal) -> Tensor"
    ),
}
"""Name -> schema of every op, in the namespace `torch.ops.octavo`."""


def reference_of(op: str) -> Callable[..., Any]:
    """The function that computes the op in plain torch, on every device."""
    return getattr(attention if op in attention.__all__ else reference, op)


library = torch.library.Library("octavo", "DEF")
_reference_library = torch.library.Library("octavo_reference", "DEF")
for _name, _schema in OPS.items():
    for _one in (library, _reference_library):
        _one.define(_name + _schema)
        _one.impl(_name, reference_of(_name), "CompositeExplicitAutograd")

# Ops for gradients only, which are not in the table. The gradient of experts is an op because it depends on the values
# of `ends`, which no compiler can trace.
library.define("straight_through(Tensor y, Tensor x, Tensor weight, Tensor weight_scale, Tensor? ends) -> Tensor")
library.impl("straight_through", lambda y, x, weight, weight_scale, ends: y.clone(), "CompositeExplicitAutograd")
library.define("experts_input_gradient(Tensor grad, Tensor ends, Tensor weight, Tensor weight_scale) -> Tensor")
library.impl("experts_input_gradient", reference.experts_input_gradient, "CompositeExplicitAutograd")

# Kernels for models that run eagerly (eager.py). They have no reference: their result is that of the ops or modules
# that they stand for.
library.define(
    "w8a8_linear_at_once(Tensor x, Tensor? input_scale, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor"
)
library.define("float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.impl("float_linear", torch.nn.functional.linear, "CompositeExplicitAutograd")
library.define("rms_norm(Tensor x, Tensor weight, float eps, bool round_first) -> Tensor")
library.define("gated(Tensor gate, Tensor up, float a, float b) -> Tensor")
library.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
library.define(
    "recurrent(Tensor p, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor h, Tensor(a!)? c, int kind, "
    "bool int8_inputs, bool backwards) -> Tensor"
)

# Called by `Int8Cache`: `quantize_per_token` of keys, or of values (`value_codes`), written into the cache.
for _one in (library, _reference_library):
    _one.define("quantize_states(Tensor x, Tensor(a!) codes, Tensor(b!) scale, bool are_values) -> ()")
    _one.impl("quantize_states", attention.quantize_states, "CompositeExplicitAutograd")

# Layers that read one input, joined in compiled graphs (`integrations/side_by_side.py`): outputs are concatenated.
library.define("w8a16_linears(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[] bias) -> Tensor")
library.impl("w8a16_linears", reference.w8a16_linears, "CompositeExplicitAutograd")
library.define(
    "w8a8_linears(Tensor x, Tensor x_scale, Tensor[] weight, Tensor[] weight_scale, Tensor?[] bias, ScalarType dtype) "
    "-> Tensor"
)
library.impl("w8a8_linears", reference.w8a8_linears, "CompositeExplicitAutograd")
