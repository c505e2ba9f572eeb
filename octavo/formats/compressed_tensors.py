"""The compressed-tensors `pack-quantized` layout: what int8 weights are called and how they lie on disk.

A weight P = "model.layers.0.mlp.up_proj.weight" of shape [N, ...] with K columns a row becomes

    P_packed  int32 [N, ceil(K/4)]     four codes a word: code + 128 as a byte, code i in bits 8*(i%4) to 8*(i%4)+7
    P_scale   [N, 1] or [N, K/g]       in the dtype of the float model
    P_shape   int64 [dimensions of P]

and config.json gets a `quantization_config` that says so. This is the W8A16 checkpoint that vLLM, transformers and
llm-compressor read and write (compressed-tensors: compressors/pack_quantized/). The same rule serves parameters of
other names (`in_proj_weight`) and of more dimensions (a convolution's rows are its flattened filters); those, and
only those, are beyond the ecosystem, and their config says `quant_method: octavo`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.recipe import Scheme

__all__ = ["check_readable", "decode", "encode", "pack", "packed_layout", "quantization_config", "unpack"]

_FORMAT = "pack-quantized"
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


def packed_layout(
    name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What the weight `name` will be on disk, tensor's name -> (dtype, shape), before its codes exist.

    shape: of the weight, [N, ...]; scale_shape: [N, 1] or [N, K/g]; scale_dtype: of the stored scale.
    """
    n, k = _rows(shape)
    return {
        f"{name}_packed": (torch.int32, (n, -(-k // _CODES_PER_WORD))),
        f"{name}_scale": (scale_dtype, tuple(scale_shape)),
        f"{name}_shape": (torch.int64, (len(shape),)),
    }


def encode(name: str, codes: Tensor, scale: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `packed_layout` for one weight.

    codes: int8 [N, ...]; scale: fp32 [N, 1] or [N, K/g]; scale_dtype: the float model's.
    Raises: CheckpointError if `scale_dtype` cannot hold the scale exactly: the codes were fitted to this scale, and
        with a rounded one every reader of the file would compute with slightly wrong weights.
    """
    stored = scale.to(scale_dtype)
    if not torch.equal(stored.to(scale.dtype), scale):
        raise CheckpointError(
            f"{name}_scale: has values that {scale_dtype} cannot hold, expected a scale that was rounded to it before "
            "the codes were computed; store the scale as torch.float32"
        )
    return {
        f"{name}_packed": pack(codes),
        f"{name}_scale": stored,
        f"{name}_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def decode(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, torch.dtype]:
    """Read weight `name` back from its tensors, as `encode` or llm-compressor wrote them.

    tensors: at least `<name>_packed`, `<name>_scale` and `<name>_shape`.
    Returns: codes int8 of the weight's shape, scale fp32 [N, 1] or [N, K/g], and the dtype that the scale is stored in.
    Raises: CheckpointError naming the tensor for one that is missing or of another shape or dtype, for a scale that is
        not finite, and for zero points or an activation order, which octavo cannot run.
    """
    for suffix, meaning in (("zero_point", "asymmetric weights"), ("g_idx", "groups in activation order")):
        if f"{name}_{suffix}" in tensors:
            raise CheckpointError(
                f"{name}_{suffix}: means {meaning}, expected symmetric weights in order; "
                "quantize the float model with octavo instead"
            )
    for suffix in ("packed", "scale", "shape"):
        if f"{name}_{suffix}" not in tensors:
            raise CheckpointError(f"{name}_{suffix}: is missing, expected it with the weight's other tensors")
    packed, scale, shape = (tensors[f"{name}_{suffix}"] for suffix in ("packed", "scale", "shape"))
    if shape.dim() != 1 or shape.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(f"{name}_shape: is {shape.dtype} {list(shape.shape)}, expected torch.int64 [dimensions]")
    codes = unpack(packed, shape.tolist(), name=f"{name}_packed")
    if not _is_scale_of(codes, scale):
        n, k = _rows(codes.shape)
        raise CheckpointError(
            f"{name}_scale: is {scale.dtype} {list(scale.shape)}, expected floating point [{n}, 1], or [{n}, groups] "
            f"with groups that divide the {k} columns of a 2-D weight"
        )
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{name}_scale: holds NaN or inf, expected finite scales; the file is corrupt")
    return codes, scale.float(), scale.dtype


def _is_scale_of(codes: Tensor, scale: Tensor) -> bool:
    if not scale.is_floating_point() or scale.dim() != 2 or scale.shape[0] != codes.shape[0]:
        return False
    groups = scale.shape[1]
    return groups == 1 or (codes.dim() == 2 and groups > 0 and codes.shape[1] % groups == 0)


def _rows(shape: Iterable[int]) -> tuple[int, int]:
    n, *rest = shape
    return n, math.prod(rest)


def quantization_config(
    layers: Mapping[str, tuple[str, Scheme]], ignore: Iterable[str], *, ecosystem: bool
) -> dict[str, Any]:
    """config.json's `quantization_config` for a `pack-quantized` checkpoint.

    layers: the quantized modules, name -> (kind, scheme). The kind is the module's class before it was quantized, such
        as "Linear" or "Embedding"; or "OutputHead", which is targeted by its name, because vLLM's head is no Linear.
    ignore: names of the modules of those classes that stay float.
    ecosystem: whether transformers and vLLM can load every layer, which is so for linear ones (for embeddings the
        layout has a place too, but transformers 5.23 fails on them and vLLM reads them in a few models); otherwise
        quant_method is "octavo", which they warn that they do not know, instead of misreading it.

    Only keys that every released reader accepts are written: their schema forbids unknown ones.
    """
    assert layers, "a model without a quantized layer has no quantization_config"
    schemes = dict.fromkeys(scheme for _, scheme in layers.values())
    if len(schemes) == 1:
        # Names come before classes: a target that finds its modules taken by an earlier one makes readers warn.
        heads = [name for name, (kind, _) in layers.items() if kind == "OutputHead"]
        targets = [heads + sorted({kind for kind, _ in layers.values()} - {"OutputHead"})]
    else:
        targets = [[name for name, (_, other) in layers.items() if other == scheme] for scheme in schemes]
    return {
        "quant_method": "compressed-tensors" if ecosystem else "octavo",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": group_targets,
                "weights": _weights_args(scheme),
                "input_activations": None,
                "output_activations": None,
            }
            for i, (scheme, group_targets) in enumerate(zip(schemes, targets, strict=True))
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights_args(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if scheme.weight.group_size is None else "group",
        "group_size": scheme.weight.group_size,
        "dynamic": False,
    }


_READABLE_WEIGHTS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("num_bits", 8, (8,)),
    ("type", "int", ("int",)),
    ("symmetric", True, (True,)),
    ("strategy", None, ("channel", "group")),
    ("dynamic", False, (False,)),
    ("actorder", None, (None, False, "weight", "static")),
)
"""(key, what its absence means, what octavo runs). actorder "weight" and "static" changed how codes were chosen, not
where they lie."""


def check_readable(quantization_config: Mapping[str, Any], where: str) -> None:
    """Refuse a quantized checkpoint that octavo cannot run, by its `quantization_config`.

    where: the file that it was found in, for the message.
    Raises: CheckpointError naming what was found and what octavo runs: 8-bit symmetric int weights with a scale per
        channel or group, `pack-quantized`, float activations, no KV cache scheme, no sparsity and no rotations.
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


def _check_model(config: Mapping[str, Any]) -> None:
    method = config.get("quant_method")
    if method not in ("compressed-tensors", "octavo"):
        raise _Unreadable(f"quant_method {method!r}", "'compressed-tensors' or 'octavo'")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _Unreadable(f"config_groups {groups!r}", "at least one group of layers")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise _Unreadable(f"{key} {config[key]!r}", "none")
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        raise _Unreadable(f"sparsity_config {sparsity!r}", "none, or format 'dense'")


def _check_group(where: str, group: Any, model_format: Any) -> None:
    if not isinstance(group, Mapping):
        raise _Unreadable(f"{where} {group!r}", "an object with targets and weights")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _Unreadable(f"{where}.{key} (quantized activations)", "none: float activations")
    group_format = group.get("format") or model_format
    if group_format != _FORMAT:
        raise _Unreadable(f"format {group_format!r} for {where}", repr(_FORMAT))
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _Unreadable(f"{where}.weights {weights!r}", "8-bit weights")
    for key, default, accepted in _READABLE_WEIGHTS:
        value = weights.get(key, default)
        if value not in accepted:
            raise _Unreadable(f"{where}.weights.{key} {value!r}", " or ".join(map(repr, accepted)))
