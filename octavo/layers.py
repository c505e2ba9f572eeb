"""THE table of layer kinds: which float layers become which int8 layers, and how their weights are laid out.

    kind                parameters that become int8                 replaced by               codes
    Linear              weight [N, K]                               QuantLinear               [N, K]
    OutputHead          weight [V, H], a Linear (opt-in)            QuantLinear               [V, H]
    Conv1D              weight [K, N] (transformers, GPT-2)         QuantLinear               [N, K], transposed
    Conv1d/2d/3d        weight [N, C/groups, *k]                    QuantConv                 [N, C/groups, *k]
    ConvTranspose1d..   weight [C, N/groups, *k]                    QuantConvTranspose        [N, C/groups, *k]
    Embedding           weight [V, H] (opt-in)                      QuantEmbedding            [V, H]
    Experts             3-D weights, see octavo.experts             QuantExperts              [E, N, K]
    MultiheadAttention  in_proj_weight [3E, E] or q/k/v_proj_weight QuantMultiheadAttention   as the parameter
    LSTM, GRU, RNN      weight_ih, _hh, _hr [N, K] of each layer    QuantRecurrent            as the parameter
    LSTMCell, GRUCell,  weight_ih, weight_hh [N, K]                 QuantRecurrentCell        as the parameter
    RNNCell

The kind of a layer is decided by its class or a base class; linear layers are also recognized by what they compute
(`alike.py`). Codes have the output channels first, so that a scale always belongs to a row. Of a convolution that
computes its weight (`computed_weights.py`) the computed weight becomes int8.

To add a kind: one row here, one module in `modules/`, one op in `ops/`, its name among the targets of `recipe.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo import modules
from octavo.alike import is_linear
from octavo.computed_weights import computed_weight
from octavo.experts import spec_of, why_not_stacks
from octavo.modules.recurrent import recurrent_weights
from octavo.ops import quantize_weight
from octavo.primitives import check_finite
from octavo.recipe import Scheme, WeightArgs
from octavo.stand_ins import attributes, made_by

__all__ = [
    "EXPERTS", "KINDS", "LINEAR", "LayerKind", "float_class", "is_stack", "kind_of", "name_in_files",
    "users_of_parameters", "why_not",
]  # fmt: skip


def _as_is(weight: Tensor, layer: nn.Module) -> Tensor:
    return weight


def _transposed(weight: Tensor, layer: nn.Module) -> Tensor:
    return weight.T


def _output_channels_first(weight: Tensor, layer: nn.Module) -> Tensor:
    groups: int = layer.groups  # type: ignore[assignment]
    channels, per_group, *kernel = weight.shape
    return weight.unflatten(0, (groups, channels // groups)).transpose(1, 2).reshape(groups * per_group, -1, *kernel)


EXPERTS = "Experts"
"""Name of the kind for stacks of experts, whose parameters have other names in every class."""


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """One row of the table.

    name: the kind's name in recipes and reports.
    classes: names of the float classes. A subclass keeps its own methods, see `facade.py`.
    module: the class of the int8 layer.
    params: names of the parameters that become int8, where the layer has them.
    rows: (parameter, layer) -> the parameter in the layout of its codes, output channels first.
    per_group: whether the weight has a K axis that can be cut into groups.
    int8_input: whether the layer can have int8 inputs. The other kinds use only the weight's part of a scheme.
    biases: names of the parameters that stay float and are added to the output, where the layer has them.
    """

    name: str
    classes: tuple[str, ...]
    module: type[modules.QuantModule]
    params: tuple[str, ...] = ("weight",)
    rows: Callable[[Tensor, nn.Module], Tensor] = _as_is
    per_group: bool = False
    int8_input: bool = False
    biases: tuple[str, ...] = ("bias",)

    @property
    def keeps_shape(self) -> bool:
        """Whether the codes of a parameter have its shape."""
        return self.rows is _as_is

    def params_of(self, layer: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of `layer` that become int8."""
        return tuple(name for name in self.params if getattr(layer, name, None) is not None)

    def biases_of(self, layer: nn.Module) -> tuple[str, ...]:
        """Names of the biases that `layer` has."""
        return tuple(name for name in self.biases if getattr(layer, name, None) is not None)

    def row_lengths(self, layer: nn.Module) -> dict[str, int]:
        """Parameter of `layer` that becomes int8 -> K, the length of its rows."""
        return {name: self.rows(getattr(layer, name), layer).shape[-1] for name in self.params_of(layer)}

    def effective(self, scheme: Scheme) -> Scheme:
        """`scheme` reduced to what this kind supports: w8a16 if inputs stay float, per_channel if there is no K
        axis."""
        if self.int8_input:
            return scheme
        in_groups = self.per_group and scheme.weight.group_size is not None
        return Scheme("w8a16", scheme.weight if in_groups else WeightArgs())

    def module_for(self, scheme: Scheme) -> type[modules.QuantModule]:
        """The class of the int8 layer under an effective scheme."""
        if scheme.input is None:
            return self.module
        return modules.DynamicQuantLinear if scheme.input.dynamic else modules.StaticQuantLinear

    def quantize_param(
        self, layer: nn.Module, param: str, weight: Tensor, scheme: Scheme, name: str
    ) -> tuple[Tensor, Tensor]:
        """Codes (int8, output channels first) and scale (fp32) of `weight`, the parameter `param` of `layer`, which
        errors call `name`."""
        args = self.effective(scheme).weight
        rows = self.rows(weight, layer)
        codes, scale = quantize_weight(rows, args.granularity, group_size=args.group_size, name=name)
        if args.granularity == "per_tensor":  # repeated for every row: ops and files then need not know this shape
            scale = scale.expand(len(rows), 1).contiguous()
        return codes, scale

    def refuse_not_finite(self, layer: nn.Module, param: str, weight: Tensor, name: str) -> None:
        """Raise the QuantizeError that `quantize_param` would raise for NaN and inf, without quantizing."""
        check_finite(weight, name)


class _ExpertsKind(LayerKind):
    """Stacks of experts: the names of the weights come from the spec; scales are per channel, int8 inputs dynamic."""

    def params_of(self, layer: nn.Module) -> tuple[str, ...]:
        spec = spec_of(layer)
        held = {name for name, _ in layer.named_parameters(remove_duplicate=False)}
        return tuple(name for name in spec.params if name in held) if spec else ()

    def row_lengths(self, layer: nn.Module) -> dict[str, int]:
        spec = spec_of(layer)
        assert spec is not None
        return {name: spec.stack(layer, name).shape[-1] for name in self.params_of(layer)}

    def effective(self, scheme: Scheme) -> Scheme:
        return Scheme("w8a16" if scheme.input is None else "w8a8")

    def module_for(self, scheme: Scheme) -> type[modules.QuantModule]:
        return self.module

    def quantize_param(
        self, layer: nn.Module, param: str, weight: Tensor, scheme: Scheme, name: str
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [E, N, K] and scale fp32 [E, N, 1], quantized one expert at a time."""
        spec = spec_of(layer)
        assert spec is not None
        rows = spec.rows(param, weight)
        codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty((*rows.shape[:2], 1), dtype=torch.float32, device=weight.device)
        for e in range(len(rows)):
            codes[e], scale[e] = quantize_weight(rows[e], name=f"{name}[{e}]")
        return codes, scale

    def refuse_not_finite(self, layer: nn.Module, param: str, weight: Tensor, name: str) -> None:
        spec = spec_of(layer)
        assert spec is not None
        for e, rows in enumerate(spec.rows(param, weight)):
            check_finite(rows, f"{name}[{e}]")


class _DynamicKind(LayerKind):
    """Layers with several weights: their int8 inputs always have dynamic scales."""

    def effective(self, scheme: Scheme) -> Scheme:
        return Scheme("w8a16", scheme.weight) if scheme.input is None else Scheme("w8a8")

    def module_for(self, scheme: Scheme) -> type[modules.QuantModule]:
        return self.module


class _RecurrentKind(_DynamicKind):
    """Recurrent layers: how many weights there are depends on the layer's settings."""

    def params_of(self, layer: nn.Module) -> tuple[str, ...]:
        return recurrent_weights(layer)

    def biases_of(self, layer: nn.Module) -> tuple[str, ...]:
        names = (name.replace("weight", "bias") for name in recurrent_weights(layer))
        return tuple(name for name in names if getattr(layer, name, None) is not None)


_EXPERTS_KIND = _ExpertsKind(EXPERTS, (), modules.QuantExperts, params=(), int8_input=True)

LINEAR = LayerKind(
    "Linear",
    ("Linear", "NonDynamicallyQuantizableLinear", "FalconLinear", "FloatLinear"),
    modules.QuantLinear,
    per_group=True,
    int8_input=True,
)

KINDS: tuple[LayerKind, ...] = (
    LINEAR,
    LayerKind("Conv1D", ("Conv1D",), modules.QuantLinear, rows=_transposed, per_group=True, int8_input=True),
    LayerKind("Conv1d", ("Conv1d",), modules.QuantConv),
    LayerKind("Conv2d", ("Conv2d",), modules.QuantConv),
    LayerKind("Conv3d", ("Conv3d",), modules.QuantConv),
    LayerKind("ConvTranspose1d", ("ConvTranspose1d",), modules.QuantConvTranspose, rows=_output_channels_first),
    LayerKind("ConvTranspose2d", ("ConvTranspose2d",), modules.QuantConvTranspose, rows=_output_channels_first),
    LayerKind("ConvTranspose3d", ("ConvTranspose3d",), modules.QuantConvTranspose, rows=_output_channels_first),
    LayerKind("Embedding", ("Embedding",), modules.QuantEmbedding, biases=()),
    _EXPERTS_KIND,
    _DynamicKind(
        "MultiheadAttention",
        ("MultiheadAttention",),
        modules.QuantMultiheadAttention,
        params=("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        per_group=True,
        int8_input=True,
        biases=("in_proj_bias", "bias_k", "bias_v"),
    ),
    *(
        _RecurrentKind(name, (name,), modules.QuantRecurrent, params=(), per_group=True, int8_input=True)
        for name in ("LSTM", "GRU", "RNN")
    ),
    *(
        _RecurrentKind(
            name,
            (name,),
            modules.QuantRecurrentCell,
            params=("weight_ih", "weight_hh"),
            per_group=True,
            int8_input=True,
        )
        for name in ("LSTMCell", "GRUCell", "RNNCell")
    ),
)

_HOMES = ("torch.nn.", "transformers.pytorch_utils", "transformers.models.falcon.", "octavo.modules.float_linear")
"""Modules in which the float classes are defined. A class of the same name elsewhere is not one of them."""


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The row of the table for `layer`, by its class, a base class or what it computes; None if there is none."""
    for base in type(layer).__mro__:
        if base.__module__.startswith(_HOMES):
            for kind in KINDS:
                if base.__name__ in kind.classes:
                    return kind
    if spec_of(layer) is not None:
        return _EXPERTS_KIND
    return LINEAR if is_linear(layer) else None


def float_class(layer: nn.Module, kind: LayerKind) -> type[nn.Module]:
    """The float class of the row `kind` that `layer` derives from, or computes the same as. Not for stacks of
    experts."""
    classes = (base for base in type(layer).__mro__ if base.__module__.startswith(_HOMES))
    return next((base for base in classes if base.__name__ in kind.classes), nn.Linear)


def name_in_files(layer: nn.Module, kind: LayerKind) -> str:
    """What `layer` is called in reports and files: the name of its kind. A layer that is recognized only by what it
    computes is called by its class, because other readers of the files find layers by the names of classes."""
    if kind is LINEAR and all(base.__name__ != kind.name for base in type(layer).__mro__):
        return type(layer).__name__
    return kind.name


_OF_FACADES = {"made_of", "_shapes"}
"""Attributes that `facade.py` adds to an int8 layer."""


@functools.cache
def _names_of_int8(module: Any) -> frozenset[str]:
    """The names of attributes that the int8 class `module`, or a class that derives from it, adds to nn.Module."""
    classes = [each for name in modules.__all__ if issubclass(each := getattr(modules, name), module)] or [module]
    declared = (inspect.get_annotations(base) for each in classes for base in each.__mro__)
    names = _OF_FACADES.union(*map(dir, classes), *declared)
    return frozenset(names.difference(dir(nn.Module), inspect.get_annotations(nn.Module)))


def _why_not_names(layer: nn.Module, kind: LayerKind) -> str | None:
    """Why the names of what the layer holds collide with names of the int8 layer or of its tensors in files; None if
    they do not. What a plain layer of its kind holds may have the same names."""
    held = {*attributes(layer), *layer._parameters, *layer._buffers, *layer._modules}
    params = kind.params_of(layer)
    plain = set(params)
    if kind.name != EXPERTS:  # whose class's methods do not stand on the int8 layer
        base: Any = float_class(layer, kind)
        own = set(type(layer).__mro__) - set(base.__mro__)
        held.update(*(vars(cls) for cls in own if not cls.__module__.startswith("torch.")))
        plain |= made_by(base)
    stored = {f"{param}{end}" for param in params for end in ("_scale", "_packed", "_shape")}
    int8: Any = kind.module
    if taken := held & (_names_of_int8(int8) | stored) - plain:
        return f"{type(layer).__name__} has a {min(taken)}, which is something else of an int8 layer"
    return None


def _why_not_experts(layer: nn.Module) -> str | None:
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (by accelerate's hooks, for one); quantize before dispatching"
    spec = spec_of(layer)
    assert spec is not None
    if reason := why_not_stacks(layer, spec):
        return reason
    return _why_not_names(layer, _EXPERTS_KIND) or _why_not_values(layer, spec.params)


def _why_not_values(layer: nn.Module, params: Iterable[str]) -> str | None:
    for param in params:
        values = attrgetter(param)(layer)
        if hasattr(type(values), "__tensor_flatten__"):  # torch's protocol of tensors made of others
            return (
                f"its {param} is a {type(values).__name__}, which holds its values in tensors of its own (sharded, or "
                "quantized by others), expected a plain one; quantize before the model is distributed"
            )
        if values.layout != torch.strided:
            return f"its {param} is stored as {values.layout}, expected a dense one; .to_dense() makes it one"
        dtype = values.dtype
        if dtype.is_complex:
            return f"its {param} is {dtype}, and int8 codes have no imaginary part"
        if not dtype.is_floating_point or dtype.itemsize == 1:
            return f"its {param} is {dtype}, already a low-precision type"
    return None


def users_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> all its names in the model: several for a tied parameter."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{own}" if name else own)
    return users


def is_stack(module: nn.Module) -> bool:
    """Whether `module` is a stack of experts that can become int8."""
    return kind_of(module) is _EXPERTS_KIND and _why_not_experts(module) is None


def why_not(layer: nn.Module, kind: LayerKind) -> str | None:
    """The reason why `layer`, of that kind, cannot be swapped for its int8 layer; None if it can."""
    if kind.name == EXPERTS:
        return _why_not_experts(layer)
    merged = computed_weight(layer) is not None and issubclass(kind.module, modules.QuantConv)
    if parametrize.is_parametrized(layer) and not merged:
        computed = next(iter(layer.parametrizations))  # type: ignore[arg-type]
        return f"its {computed} is computed by a parametrization (weight_norm, ...); remove_parametrizations first"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (by accelerate's hooks, for one); quantize before dispatching"
    for param in (*kind.params_of(layer), *kind.biases_of(layer)):
        is_own = param in layer._parameters or (merged and param == "weight")
        if not is_own:
            return (
                f"its {param} is not a parameter but computed elsewhere (an old-style weight_norm or pruning?); "
                "prune.remove, remove_weight_norm or remove_spectral_norm makes it one"
            )
    if kind.name == "Embedding" and layer.max_norm is not None:
        return "max_norm renormalizes the float table at every lookup"
    return _why_not_names(layer, kind) or _why_not_values(layer, kind.params_of(layer))
