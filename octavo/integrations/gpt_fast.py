"""gpt-fast's int8 weight-only checkpoints, read and written bit for bit.

gpt-fast (quantize.py, `WeightOnlyInt8QuantHandler`) keeps a state dict in one .pth file, in which each linear layer has

    <name>.weight   int8 [N, K]     code = clamp(round(w / scale), -128, 127)
    <name>.scales   [N]             scale = max(amax / 127.5, 2**-23) in fp32, stored in the weight's dtype
    <name>.bias     [N]             if the layer has one

and, in its Mixtral, each `ConditionalFeedForward`

    <name>.w1, .w2, .w3             int8 [E, I, D], [E, D, I], [E, I, D]
    <name>.scales1, 2, 3            fp32 [E, I], [E, D], [E, I]

with routers (linear layers called `gate`) in float. Everything else is as in the float model. The codes are fitted to
the fp32 scale and not to the stored one: `primitives.Range` "full". A model with octavo's own codes can be written too;
gpt-fast runs any codes and scales.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.errors import CheckpointError, QuantizeError
from octavo.experts import spec_of
from octavo.feeding import check_module
from octavo.formats.compressed_tensors import can_be_scale
from octavo.formats.loading import refuse_lost_buffers
from octavo.formats.outputs import new_file
from octavo.formats.saving import unwrapped
from octavo.integrations.hub import prepare_for_library
from octavo.layers import kind_of, why_not
from octavo.modules import Codes, QuantExperts, QuantLinear, QuantModule
from octavo.primitives import quantize_weight
from octavo.quantization.install import install
from octavo.quantization.plan import Decision
from octavo.recipe import Scheme

__all__ = ["load", "read", "save", "state_dict"]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """gpt-fast's quantized state dict of `model`; what its `create_quantized_state_dict` returns.

    model: a float model, whose linear layers and experts are quantized by gpt-fast's own formula; or one with octavo's
        int8 ones (per_channel), whose codes are taken as they are. Not modified. Of one that torch.compile or
        DataParallel wrapped, the model itself is meant.
    Returns: name -> tensor, as in the head of this file.
    Raises: QuantizeError for int8 layers that gpt-fast does not have: other kinds than linear, per_group, int8 inputs.
    """
    check_module(model)
    model = unwrapped(model)
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if _is_conditional_feed_forward(module):
            tensors |= _experts(module, name, tensors)
        elif isinstance(module, QuantModule):
            if not isinstance(module, QuantLinear) or module.codes_and_scale()[1].shape[1] != 1 or module.scheme.input:
                raise QuantizeError(
                    f"{name}: is an int8 {module.replaces} ({module.scheme}); gpt-fast has int8 linear layers with one "
                    "scale for each output channel and float inputs only: quantize again with ignore=, or as 'w8a16' "
                    "without group_size"
                )
            tensors[f"{name}.weight"], scale = module.codes_and_scale()
            tensors.pop(f"{name}.weight_scale", None)
            tensors[f"{name}.scales"] = scale.squeeze(1).to(module.float_dtype)
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] != _ROUTER:
            codes, scale = quantize_weight(module.weight.detach(), value_range="full", name=f"{name}.weight")
            tensors[f"{name}.weight"], tensors[f"{name}.scales"] = codes, scale.squeeze(1).to(module.weight.dtype)
    return tensors


_ROUTER = "gate"
_EXPERTS = {"w1": "scales1", "w2": "scales2", "w3": "scales3"}


def _is_conditional_feed_forward(module: nn.Module) -> bool:
    spec = module.spec if isinstance(module, QuantExperts) else spec_of(module)
    return spec is not None and set(spec.params) == set(_EXPERTS) and spec.routing == "each"


def _experts(module: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ConditionalFeedForward, float or int8."""
    if isinstance(module, QuantExperts) and module.scheme.input:
        raise QuantizeError(f"{name}: has int8 inputs ({module.scheme}); gpt-fast's are float: quantize as 'w8a16'")
    found: dict[str, Tensor] = {}
    for param, scales in _EXPERTS.items():
        if isinstance(module, QuantExperts):
            codes, scale = module.codes()[param]
            tensors.pop(f"{name}.{param}_scale", None)
        else:
            stack = module.get_parameter(param).detach()
            pairs = [quantize_weight(one, value_range="full", name=f"{name}.{param}") for one in stack]
            codes, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        found |= {f"{name}.{param}": codes, f"{name}.{scales}": scale.squeeze(-1)}
    return found


def save(model: nn.Module, file: str | Path) -> Path:
    """Write `state_dict(model)` as a .pth file, whole or not at all.

    Raises: CheckpointError if the file exists or cannot be written; QuantizeError as `state_dict` does.
    """
    tensors = state_dict(model)
    with new_file(file) as temporary:
        torch.save(tensors, temporary)
    return Path(file)


def read(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a .pth file, read with weights_only: nothing in the file is executed.

    Raises: CheckpointError for a file that is missing, damaged, holds anything but dense tensors, or has no int8
        weights.
    """
    try:
        is_mapped = zipfile.is_zipfile(file)  # what torch wrote before 1.6 cannot be
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # what a damaged pickle raises differs between releases
        raise CheckpointError(f"{file}: is not a state dict that can be read safely: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file}: holds something else than a state dict of dense tensors, as gpt-fast writes")
    if not any(name.endswith((".scales", *_EXPERTS.values())) for name in tensors):
        raise CheckpointError(f"{file}: has no <name>.scales; expected gpt-fast's int8 checkpoint, this one is float")
    return tensors


def load(file: str | Path, model: nn.Module) -> nn.Module:
    """Load gpt-fast's int8 state dict into a freshly built float model of the same structure, in place.

    model: with any weights, or on `meta`. Its linear layers become QuantLinear with the file's codes.
    Returns: `model`.
    Raises: CheckpointError, before the model is changed, for a file that cannot be read or does not fit the model.
    """
    tensors = read(file)
    codes = {
        name.removesuffix(".scales"): (tensors[name.removesuffix(".scales") + ".weight"], tensors[name])
        for name in tensors
        if name.endswith(".scales") and name.removesuffix(".scales") + ".weight" in tensors
    }
    stacks = [name.removesuffix(".scales1") for name in tensors if name.endswith(".scales1")]
    decisions = [_decision(str(file), model, name, *pair) for name, pair in codes.items()]
    decisions += [_experts_decision(str(file), model, name, tensors) for name in stacks]
    int8 = {f"{name}.{part}" for name in codes for part in ("weight", "scales")}
    int8 |= {f"{name}.{part}" for name in stacks for pair in _EXPERTS.items() for part in pair}
    floats = {name: tensor for name, tensor in tensors.items() if name not in int8}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in int8}
    for name in (*expected, *floats):
        if _shape(floats, name) != _shape(expected, name):
            raise CheckpointError(
                f"{file}: does not fit the model: {name!r} is {_shape(floats, name)} in the file and "
                f"{_shape(expected, name)} in the model"
            )
        if expected[name].is_floating_point() and not floats[name].is_floating_point():
            raise CheckpointError(
                f"{file}: does not fit the model: {name!r} is {floats[name].dtype} in the file and "
                f"{expected[name].dtype} in the model"
            )
    refuse_lost_buffers(file, model)

    def codes_of(decision: Decision, layer: nn.Module) -> tuple[Codes, torch.dtype]:
        if decision.name in stacks:
            parts = {param: (f"{decision.name}.{param}", f"{decision.name}.{s}") for param, s in _EXPERTS.items()}
            return {
                param: (_copy(tensors[weight]), tensors[scales].float().unsqueeze(-1))
                for param, (weight, scales) in parts.items()
            }, tensors[f"{decision.name}.scales1"].dtype
        weight, scales = codes[decision.name]
        return {"weight": (_copy(weight), scales.float().unsqueeze(1))}, scales.dtype

    install(model, decisions, codes_of=codes_of)
    model.load_state_dict({name: tensor.clone() for name, tensor in floats.items()}, strict=False, assign=True)
    prepare_for_library(model, "float")
    return model


def _decision(file: str, model: nn.Module, name: str, weight: Tensor, scales: Tensor) -> Decision:
    layer = dict(model.named_modules()).get(name)
    kind = kind_of(layer) if layer is not None else None
    if layer is None or kind is None or kind.name != "Linear" or why_not(layer, kind):
        raise CheckpointError(f"{file}: has int8 weights for {name!r}, which is no plain linear layer of the model")
    n, k = layer.weight.shape
    if weight.dtype != torch.int8 or tuple(weight.shape) != (n, k) or tuple(scales.shape) != (n,):
        raise CheckpointError(
            f"{file}: {name} has a weight of {weight.dtype} {list(weight.shape)} and scales {list(scales.shape)}, "
            f"expected torch.int8 [{n}, {k}] and [{n}]"
        )
    _check_scales(file, f"{name}.scales", scales)
    return Decision(name, kind, kind.name, Scheme("w8a16"))


def _experts_decision(file: str, model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Decision:
    layer = dict(model.named_modules()).get(name)
    kind = kind_of(layer) if layer is not None else None
    if layer is None or kind is None or not _is_conditional_feed_forward(layer) or why_not(layer, kind):
        raise CheckpointError(f"{file}: has int8 experts for {name!r}, which is no ConditionalFeedForward of the model")
    for param, scales in _EXPERTS.items():
        expected = list(layer.get_parameter(param).shape)
        got, got_scales = (_shape(tensors, f"{name}.{part}") for part in (param, scales))
        if got != expected or got_scales != expected[:2] or tensors[f"{name}.{param}"].dtype != torch.int8:
            raise CheckpointError(
                f"{file}: {name}.{param} is {got} with {scales} {got_scales}, expected int8 {expected} and "
                f"{expected[:2]}"
            )
        _check_scales(file, f"{name}.{scales}", tensors[f"{name}.{scales}"])
    return Decision(name, kind, kind.name, Scheme("w8a16"))


def _check_scales(file: str, name: str, scales: Tensor) -> None:
    if not can_be_scale(scales) or not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"{file}: {name} is {scales.dtype} or holds NaN or inf, expected finite floating point scales of 16 "
            "bits or more; the file is corrupt"
        )


def _copy(codes: Tensor) -> Tensor:
    """A contiguous copy, which kernels need, in memory of its own: tensors in the file may have any strides."""
    return codes.clone(memory_format=torch.contiguous_format)


def _shape(tensors: Mapping[str, Tensor], name: str) -> object:
    return list(tensors[name].shape) if name in tensors else "missing"
