"""The two int8 layouts of compressed-tensors: how int8 weights are named and laid out on disk.

A weight P = "model.layers.0.mlp.up_proj.weight" of shape [N, ...] with K columns a row, whose inputs stay float, is
laid out as `pack-quantized`:

    P_packed  int32 [N, ceil(K/4)]     four codes a word: code + 128 as a byte, code i in bits 8*(i%4) to 8*(i%4)+7
    P_scale   [N, 1] or [N, K/g]       in the dtype of the float model
    P_shape   int64 [dimensions of P]

and one of a linear layer whose inputs are int8 too as `int-quantized`:

    P            int8 [N, K]           the codes as they are
    P_scale      [N, 1]                in the dtype of the float model
    input_scale  [1]                   beside P, in the same dtype; of static inputs only

config.json gets a `quantization_config` that says which layer is which: these are the W8A16 and W8A8 checkpoints that
vLLM, transformers and llm-compressor read and write (compressed-tensors: compressors/pack_quantized/ and
compressors/naive_quantized/). A model with both is of the format `mixed-precision`. The first rule serves parameters
of other names (`in_proj_weight`) and of more dimensions (a convolution's rows are its flattened filters); those, and
only those, are beyond the ecosystem, and their config says `quant_method: octavo`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.recipe import InputArgs, Scheme, WeightArgs, pattern_matches

__all__ = [
    "as_stored",
    "can_be_scale",
    "check_readable",
    "decode",
    "decode_input_scale",
    "decode_shape",
    "encode",
    "input_scale_name",
    "inputs_of",
    "pack",
    "parts_of",
    "quantization_config",
    "stored_layout",
    "stored_scheme",
    "unpack",
]

_PACKED = "pack-quantized"
_PLAIN = "int-quantized"
_MIXED = "mixed-precision"
_CODES_PER_WORD = 4
_SIGN_BIT = 0x80  # code + 128 as a byte is the code with its sign bit flipped


def pack(codes: Tensor) -> Tensor:
    """Four codes a word, row by row: bit-identical to compressed_tensors' `pack_to_int32(codes, 8)` for 2-D codes.

    codes: int8 [N, ...], K elements a row.
    Returns: int32 [N, ceil(K/4)]; the bytes past K are 0.
    """
    assert codes.dtype == torch.int8 and codes.dim() >= 1, (codes.dtype, codes.shape)
    n, k = _rows(codes.shape)
    packed = torch.empty(n, -(-k // _CODES_PER_WORD), dtype=torch.int32, device=codes.device)
    as_bytes = packed.view(torch.uint8)
    torch.bitwise_xor(codes.reshape(n, k).view(torch.uint8), _SIGN_BIT, out=as_bytes[:, :k])
    as_bytes[:, k:] = 0
    return packed


def unpack(packed: Tensor, shape: Iterable[int], *, name: str = "packed") -> Tensor:
    """The inverse of `pack`.

    packed: int32 [N, ceil(K/4)].
    shape: [N, ...] of the codes.
    name: what errors call the tensor.
    Returns: int8 of `shape`, contiguous, in memory of its own.
    Raises: CheckpointError if `packed` is not int32 or not of the shape that `shape` packs to.
    """
    shape = tuple(shape)
    if not shape or min(shape) < 0:
        raise CheckpointError(f"{name}: its weight_shape says {list(shape)}, expected [rows, ...]; the file is corrupt")
    n, k = _rows(shape)
    expected = (n, -(-k // _CODES_PER_WORD))
    if packed.dtype != torch.int32 or packed.shape != expected:
        raise CheckpointError(
            f"{name}: is {packed.dtype} {list(packed.shape)}, expected torch.int32 {list(expected)} for a weight of "
            f"shape {list(shape)} at four codes a word; the file is corrupt or not 8-bit"
        )
    as_bytes = packed.contiguous().view(torch.uint8)[:, :k]
    return as_bytes.bitwise_xor(_SIGN_BIT).view(torch.int8).reshape(shape)


def input_scale_name(name: str) -> str:
    """What the scale of a layer's static inputs is called; name: of the layer's weight."""
    prefix, dot, _ = name.rpartition(".")
    return f"{prefix}{dot}input_scale"


def parts_of(name: str) -> tuple[str, ...]:
    """Names of all tensors that may belong to the weight `name`, in either layout (and in asymmetric ones)."""
    suffixes = ("", "_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    return (*(f"{name}{suffix}" for suffix in suffixes), input_scale_name(name))


def stored_layout(
    name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], scale_dtype: torch.dtype, scheme: Scheme
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What the weight `name` will be on disk, tensor's name -> (dtype, shape), before its codes exist.

    shape: of the weight, [N, ...]; scale_shape: [N, 1] or [N, K/g]; scale_dtype: of the stored scale.
    """
    n, k = _rows(shape)
    scale = {f"{name}_scale": (scale_dtype, tuple(scale_shape))}
    if scheme.input is None:
        codes = {f"{name}_packed": (torch.int32, (n, -(-k // _CODES_PER_WORD)))}
        return {**codes, **scale, f"{name}_shape": (torch.int64, (len(shape),))}
    static = {input_scale_name(name): (scale_dtype, (1,))} if scheme.is_static else {}
    return {name: (torch.int8, tuple(shape)), **scale, **static}


def encode(
    name: str,
    codes: Tensor,
    scale: Tensor,
    scale_dtype: torch.dtype,
    scheme: Scheme,
    input_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of `stored_layout` for one weight.

    codes: int8 [N, ...]; scale: fp32 [N, 1] or [N, K/g]; scale_dtype: the float model's; input_scale: fp32 [1], of a
        scheme with static inputs.
    Raises: CheckpointError if `scale_dtype` cannot hold a scale exactly: the codes were fitted to this scale, and
        with a rounded one every reader of the file would compute with slightly wrong numbers.
    """
    stored = {f"{name}_scale": _exactly(scale, scale_dtype, f"{name}_scale")}
    if scheme.input is None:
        return {f"{name}_packed": pack(codes), **stored, f"{name}_shape": torch.tensor(codes.shape, dtype=torch.int64)}
    if scheme.is_static:
        assert input_scale is not None
        stored[input_scale_name(name)] = _exactly(input_scale, scale_dtype, input_scale_name(name))
    return {name: codes.contiguous(), **stored}


def _exactly(scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`scale` in `dtype`, in memory of its own: layers that are fed one tensor hold one input_scale."""
    stored = scale.to(dtype, copy=True)
    if not torch.equal(stored.to(scale.dtype), scale):
        raise CheckpointError(
            f"{name}: has values that {dtype} cannot hold, expected a scale that was rounded to it before the codes "
            "were computed; store the scale as torch.float32"
        )
    return stored


def decode(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, torch.dtype]:
    """Read weight `name` back from its tensors, as `encode` or llm-compressor wrote them in either layout.

    tensors: those of `parts_of(name)` that there are.
    Returns: codes int8 of the weight's shape, scale fp32 [N, 1] or [N, K/g], and the dtype that the scale is stored in.
        One stored scale for the whole weight comes back as that of every row.
    Raises: CheckpointError naming the tensor for one that is missing or of another shape or dtype, for a scale that is
        not finite, and for zero points or an activation order, which octavo cannot run.
    """
    for suffix, meaning in (("zero_point", "asymmetric weights"), ("g_idx", "groups in activation order")):
        if f"{name}_{suffix}" in tensors:
            raise CheckpointError(
                f"{name}_{suffix}: means {meaning}, expected symmetric weights in order; "
                "quantize the float model with octavo instead"
            )
    codes = _decode_codes(name, tensors)
    scale = _part(tensors, f"{name}_scale")
    if scale.dim() < 2 and scale.numel() == 1:
        scale = scale.expand(codes.shape[0], 1).contiguous()
    if not _is_scale_of(codes, scale):
        n, k = _rows(codes.shape)
        raise CheckpointError(
            f"{name}_scale: is {scale.dtype} {list(scale.shape)}, expected floating point [{n}, 1], or [{n}, groups] "
            f"with groups that divide the {k} columns of a 2-D weight, of 16 bits or more"
        )
    return codes, _finite(scale, f"{name}_scale"), scale.dtype


def _decode_codes(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    plain = tensors.get(name)
    if plain is not None and plain.dtype == torch.int8:
        if plain.dim() < 1:
            raise CheckpointError(f"{name}: is a single int8 code, expected [rows, ...]; the file is corrupt")
        return plain
    packed, shape = (_part(tensors, f"{name}_{suffix}") for suffix in ("packed", "shape"))
    return unpack(packed, decode_shape(shape, f"{name}_shape"), name=f"{name}_packed")


def decode_shape(shape: Tensor, name: str) -> tuple[int, ...]:
    """The shape of packed codes as it lies on disk, int64 [dimensions]. Raises CheckpointError naming it, `name`, for
    any other tensor."""
    if shape.dim() != 1 or shape.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(f"{name}: is {shape.dtype} {list(shape.shape)}, expected torch.int64 [dimensions]")
    return tuple(shape.tolist())


def decode_input_scale(scale: Tensor, name: str) -> Tensor:
    """The scale of a layer's static inputs as it lies on disk, [1] or [] of any float dtype -> fp32 [1].

    Raises: CheckpointError naming it, `name`, if it is of another shape or dtype, not finite or not positive.
    """
    if not can_be_scale(scale) or scale.dim() > 1 or scale.numel() != 1:
        raise CheckpointError(
            f"{name}: is {scale.dtype} {list(scale.shape)}, expected floating point [1], of 16 bits or more"
        )
    if not bool(scale > 0):
        raise CheckpointError(f"{name}: is {scale.item()}, expected a positive scale; the file is corrupt")
    return _finite(scale, name).reshape(1)


def _part(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: is missing, expected it with the weight's other tensors")
    return tensors[name]


def _finite(scale: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{name}: holds NaN or inf, expected finite scales; the file is corrupt")
    return scale.float()


def can_be_scale(tensor: Tensor) -> bool:
    """Whether its dtype is one that scales are stored in: floating point of 16 bits or more."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def _is_scale_of(codes: Tensor, scale: Tensor) -> bool:
    if not can_be_scale(scale) or scale.dim() != 2 or scale.shape[0] != codes.shape[0]:
        return False
    groups = scale.shape[1]
    return groups == 1 or (codes.dim() == 2 and groups > 0 and codes.shape[1] % groups == 0)


def _rows(shape: Iterable[int]) -> tuple[int, int]:
    n, *rest = shape
    return n, math.prod(rest)


def as_stored(scheme: Scheme) -> Scheme:
    """`scheme` as it can be read back from files, which store neither a preset's name nor that all rows share a
    scale."""
    return stored_scheme(WeightArgs() if scheme.weight.group_size is None else scheme.weight, scheme.input)


def stored_scheme(weight: WeightArgs, inputs: InputArgs | None) -> Scheme:
    """The scheme of a layer with this quantization of its weight and its inputs."""
    if inputs is None:
        return Scheme("w8a16", weight)
    return Scheme("w8a8" if inputs.dynamic else "w8a8-static", weight, inputs)


def quantization_config(
    layers: Mapping[str, tuple[str, Scheme]], ignore: Iterable[str], *, ecosystem: bool
) -> dict[str, Any]:
    """config.json's `quantization_config` for an int8 checkpoint: a group for each scheme as it is stored.

    layers: the quantized modules, name -> (kind, scheme). The kind is the module's class before it was quantized, such
        as "Linear" or "Embedding"; or "OutputHead", which is targeted by its name, because vLLM's head is no Linear.
    ignore: names of the modules of those classes that stay float.
    ecosystem: whether transformers and vLLM can load every layer, which is so for linear ones (for embeddings the
        layout has a place too, but transformers 5.23 fails on them and vLLM reads them in a few models); otherwise
        quant_method is "octavo", which they warn that they do not know, instead of misreading it.

    Only keys that every released reader accepts are written: their schema forbids unknown ones. A group has a format
    of its own only where there are two.
    """
    assert layers, "a model without a quantized layer has no quantization_config"
    groups: dict[Scheme, list[str]] = {}
    for name, (_, scheme) in layers.items():
        groups.setdefault(as_stored(scheme), []).append(name)
    if len(groups) == 1:
        # Names come before classes: a target that finds its modules taken by an earlier one makes readers warn.
        heads = [name for name, (kind, _) in layers.items() if kind == "OutputHead"]
        groups = {scheme: heads + sorted({kind for kind, _ in layers.values()} - {"OutputHead"}) for scheme in groups}
    formats = {_format_of(scheme) for scheme in groups}
    mixed = len(formats) > 1
    return {
        "quant_method": "compressed-tensors" if ecosystem else "octavo",
        "format": _MIXED if mixed else min(formats),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                "weights": _weights_args(scheme),
                "input_activations": _input_args(scheme),
                "output_activations": None,
                **({"format": _format_of(scheme)} if mixed else {}),
            }
            for i, (scheme, targets) in enumerate(groups.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _format_of(scheme: Scheme) -> str:
    return _PACKED if scheme.input is None else _PLAIN


def _weights_args(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if scheme.weight.group_size is None else "group",
        "group_size": scheme.weight.group_size,
        "dynamic": False,
    }


_STRATEGIES = {"per_token": "token", "per_tensor": "tensor"}


def _input_args(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.input is None:
        return None
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": _STRATEGIES[scheme.input.granularity],
        "group_size": None,
        "dynamic": scheme.input.dynamic,
    }


def inputs_of(
    quantization_config: Mapping[str, Any], names: Collection[str], classes: Collection[str]
) -> InputArgs | None:
    """How the inputs of one layer are quantized according to a readable `quantization_config`; None for float.

    names: of the layer, in the model and on disk. classes: the names of its class and of the bases of that.
    Raises: CheckpointError if groups differ and none of them is for this layer.
    """
    groups = list(quantization_config["config_groups"].values())
    inputs = [_read_input_args(group.get("input_activations")) for group in groups]
    if len(set(inputs)) == 1:
        return inputs[0]
    # As compressed-tensors has it: a group that names the layer goes before a pattern, and a pattern before a class.
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target in names,
        lambda target: target.startswith("re:") and any(pattern_matches(target, name) for name in names),
        lambda target: target in classes,
    )
    for matches in ways:
        for group, args in zip(groups, inputs, strict=True):
            if any(matches(target) for target in group.get("targets") or ()):
                return args
    raise CheckpointError(f"quantization_config: no group of config_groups targets {min(names)!r}, which is int8")


def _read_input_args(args: Mapping[str, Any] | None) -> InputArgs | None:
    if not args:
        return None
    token = args.get("strategy") == "token"
    return InputArgs("per_token" if token else "per_tensor", dynamic=bool(args.get("dynamic", False)))


_READABLE: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("num_bits", 8, (8,)),
    ("type", "int", ("int",)),
    ("symmetric", True, (True,)),
)
_READABLE_WEIGHTS = (
    *_READABLE,
    ("strategy", None, ("channel", "group", "tensor")),
    ("dynamic", False, (False,)),
    ("actorder", None, (None, False, "weight", "static")),
)
_READABLE_INPUTS = (*_READABLE, ("strategy", None, ("token", "tensor")), ("dynamic", False, (True, False)))
"""(key, value if it is absent, values that octavo can run). With actorder "weight" or "static" codes were chosen in
another order, but are stored in the usual one."""


def check_readable(quantization_config: Mapping[str, Any], where: str) -> None:
    """Refuse a quantized checkpoint that octavo cannot run, by its `quantization_config`.

    where: the file that it was found in, for the message.
    Raises: CheckpointError naming what was found and what octavo runs: 8-bit symmetric int weights with a scale per
        channel, group or tensor, `pack-quantized` or `int-quantized`; float inputs, or 8-bit symmetric ones with a
        dynamic scale per token or tensor or a static one per tensor; no KV cache scheme, no sparsity, no rotations.
    """
    try:
        _check_model(quantization_config)
        for name, group in quantization_config["config_groups"].items():
            _check_group(f"config_groups.{name}", group, quantization_config.get("format"))
    except _Unreadable as found:
        raise CheckpointError(
            f"{where}: quantization_config has {found}; quantize the float model with octavo instead"
        ) from None


class _Unreadable(Exception):
    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}, expected {expected}")


def _check_model(config: Any) -> None:
    if not isinstance(config, Mapping):
        raise _Unreadable(repr(config), "an object")
    method = config.get("quant_method")
    if method not in ("compressed-tensors", "octavo"):
        raise _Unreadable(f"quant_method {method!r}", "'compressed-tensors' or 'octavo'")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _Unreadable(f"config_groups {groups!r}", "at least one group of layers")
    _check_patterns("ignore", config.get("ignore"))
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise _Unreadable(f"{key} {config[key]!r}", "none")
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        raise _Unreadable(f"sparsity_config {sparsity!r}", "none, or format 'dense'")


def _check_group(where: str, group: Any, model_format: Any) -> None:
    if not isinstance(group, Mapping):
        raise _Unreadable(f"{where} {group!r}", "an object with targets and weights")
    _check_patterns(f"{where}.targets", group.get("targets"))
    if group.get("output_activations"):
        raise _Unreadable(f"{where}.output_activations (quantized outputs)", "none: float outputs")
    group_format = group.get("format") or model_format
    if group_format not in (_PACKED, _PLAIN):
        raise _Unreadable(f"format {group_format!r} for {where}", f"{_PACKED!r} or {_PLAIN!r}")
    _check_args(f"{where}.weights", group.get("weights"), _READABLE_WEIGHTS)
    inputs = group.get("input_activations")
    if not inputs:
        return
    _check_args(f"{where}.input_activations", inputs, _READABLE_INPUTS)
    if inputs["strategy"] == "token" and not inputs.get("dynamic", False):
        raise _Unreadable(f"{where}.input_activations.dynamic False with strategy 'token'", "True")


def _check_patterns(where: str, patterns: Any) -> None:
    if patterns is None:
        return
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _Unreadable(f"{where} {patterns!r}", "a list of layers' names, classes and 're:' patterns")
    for pattern in (pattern for pattern in patterns if pattern.startswith("re:")):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError) as error:
            raise _Unreadable(f"{where} {pattern!r}", f"a regular expression ({error})") from error


def _check_args(where: str, args: Any, readable: Iterable[tuple[str, Any, tuple[Any, ...]]]) -> None:
    if not isinstance(args, Mapping):
        raise _Unreadable(f"{where} {args!r}", "8-bit quantization arguments")
    for key, default, accepted in readable:
        value = args.get(key, default)
        if value not in accepted:
            raise _Unreadable(f"{where}.{key} {value!r}", " or ".join(map(repr, accepted)))
