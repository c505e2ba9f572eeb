"""Write a model with int8 layers as a checkpoint folder: safetensors, config.json, what stayed float and why.

    model.layers.0.mlp.up_proj (QuantLinear)  ->  its codes and scales, as compressed_tensors.py lays them out
    a norm, a bias, a float layer             ->  as it is
    weights that two layers share             ->  once, under the name of the first

config.json is the model's own with a `quantization_config` added, so that transformers and vLLM load a folder whose
int8 layers are all linear; a folder with others (convolutions, embeddings) is marked as octavo's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import CheckpointError, OctavoError, OctavoWarning, QuantizeError
from octavo.experts import routers
from octavo.feeding import Progress, check_module, check_progress
from octavo.formats import compressed_tensors as layout
from octavo.formats.checkpoint import CheckpointWriter
from octavo.formats.companions import NOT_A_TOKENIZERS, copy_companions
from octavo.formats.experts import expert_parts
from octavo.formats.outputs import new_folder
from octavo.layers import KINDS, LINEAR, kind_of
from octavo.modules import QuantExperts, QuantModule, StaticQuantLinear
from octavo.quantization.coverage import Coverage, coverage
from octavo.recipe import OPT_IN_TARGETS, READ_BY_OTHERS, Scheme

__all__ = [
    "COVERAGE_FILE",
    "OnDisk",
    "describe_layout",
    "fingerprint",
    "quantization_config",
    "save",
    "state_dict",
    "unwrapped",
    "write_descriptions",
]

COVERAGE_FILE = "octavo_coverage.json"
"""File beside the weights: what is float and why (`Coverage.to_dict`), and the `fingerprint` of the weights."""

OnDisk = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Tensors by their names in the model -> the same tensors by their names on disk. A float tensor may become several,
which the model's library merges again when it loads them."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    on_disk: OnDisk | None = None,
    attention: str = "float",
    config: Mapping[str, Any] | None = None,
    stem: str = "model",
    progress: Progress | None = None,
) -> Path:
    """Write a quantized model as a checkpoint folder: safetensors, config.json, tokenizer and generation files.

    model: has at least one int8 layer. For a transformers model the folder loads in transformers and vLLM.
    folder: must not exist (an empty one may).
    tokenizer: tokenizer or processor to save along. The files beside the model's own checkpoint are copied, if it was
        loaded from a local folder: all without a tokenizer, else code and the settings of processors.
    max_shard_size: bytes, or "5GB".
    on_disk: gives the tensors the names that they have on disk, where those differ from the model's.
    attention: of the model, "float" or "int8".
    config: content of config.json but for the quantization; by default that of a transformers model, with the files
        that belong to it.
    stem: what the names of the weights' files begin with.
    Returns: the folder's path.
    Raises: QuantizeError if no layer is int8; CheckpointError if the folder exists or cannot be written whole.
    Warns: OctavoWarning if a layer's kind keeps transformers and vLLM from loading the folder.
    """
    check_module(model)
    check_progress(progress)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise OctavoError(
            f"tokenizer is {tokenizer!r}, expected a tokenizer or processor of transformers, such as "
            "AutoTokenizer.from_pretrained returns, or None"
        )
    report = coverage(model)
    if not _int8_layers(model):
        raise QuantizeError("the model has no int8 layer to save; call octavo.quantize(model, 'w8a16') first")
    tensors, names, parts = _renamed(_stored(model), on_disk)
    tensors |= _stored_experts(model, on_disk)
    with new_folder(folder) as temporary:
        plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, stored in tensors.items():
            plan.update(stored.plan(name))
        with CheckpointWriter(temporary, plan, max_shard_size=max_shard_size, stem=stem) as writer:
            for done, (name, stored) in enumerate(tensors.items(), 1):
                for stored_name, encoded in stored.encode(name).items():
                    writer.write(stored_name, encoded)
                if progress:
                    progress(done, len(tensors))
        described = dict(config) if config is not None else _describe_model(model, temporary, tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        described["quantization_config"] = quantization_config(
            *_described(model, on_disk),
            ecosystem="model_type" in described,
            names=names,
            parts=parts,
            attention=attention,
        )
        write_descriptions(temporary, described, report, plan)
    return Path(folder)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch.compile and DataParallel, whose parameter names have no prefix."""
    while True:
        if type(model).__name__ == "OptimizedModule":  # torch._dynamo's, which is slow to import
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def state_dict(model: nn.Module, on_disk: OnDisk | None = None) -> dict[str, Tensor]:
    """All tensors of a quantized model as `save` lays them out, in memory, under their names in the model (those of
    experts under their names on disk): int8 weights in their layout, shared ones once."""
    encoded: dict[str, Tensor] = {}
    for name, stored in (_stored(model) | _stored_experts(model, on_disk)).items():
        encoded.update(stored.encode(name))
    return encoded


def describe_layout(model: nn.Module, on_disk: OnDisk | None = None, attention: str = "float") -> dict[str, Any]:
    """The `quantization_config` of a quantized model as config.json holds it, marked as for octavo only.

    on_disk, attention: as for `save`. Raises: QuantizeError if no layer holds codes.
    """
    return quantization_config(*_described(model, on_disk), ecosystem=False, attention=attention)


def quantization_config(
    layers: Mapping[str, tuple[str, Scheme]],
    unquantized: Iterable[str],
    *,
    ecosystem: bool,
    names: Mapping[str, str] | None = None,
    parts: Collection[str] = (),
    attention: str = "float",
) -> dict[str, Any]:
    """config.json's `quantization_config`, marked as octavo's own if something in it is beyond other readers.

    layers: int8 layer's name -> (its kind, its scheme). unquantized: names of linear and embedding layers that hold
        no codes of their own.
    ecosystem: whether other readers may load it, if the layers' kinds allow.
    names: layer's name in the model -> on disk, where it differs. To leave a layer alone a reader needs the name that
        it goes by: transformers the model's, vLLM the one on disk.
    parts: names on disk of float tensors that the model holds merged with others (the experts of a layer).
    attention: written if it is not "float", under a key of octavo's own: other readers run such a model too, with
        float attention.
    Raises: QuantizeError if no layer holds codes.
    Warns: OctavoWarning if `ecosystem` was hoped for and something forbids it.
    """
    if not layers:
        raise QuantizeError("no layer of the model is int8, so there is no int8 checkpoint to write; widen the recipe")
    foreign = sorted({kind for kind, _ in layers.values()} - set(READ_BY_OTHERS))
    if ecosystem and (foreign or parts):
        found = f"int8 layers of kind {', '.join(foreign)}" if foreign else f"merged float tensors ({min(parts)}, ...)"
        warnings.warn(
            f"{found} are read by octavo only: transformers and vLLM will not load this checkpoint"
            + (f". For one that they load, {_without(foreign)}" if foreign and not parts else ""),
            OctavoWarning,
            stacklevel=4,
        )
    ignore = [*unquantized, *(part.rpartition(".")[0] for part in sorted(parts))]
    ignore += [names[name] for name in unquantized if name in names] if names else []
    own = {} if attention == "float" else {"attention": attention}
    shared = ecosystem and not foreign and not parts
    return {**layout.quantization_config(layers, dict.fromkeys(ignore), ecosystem=shared), **own}


def _without(kinds: list[str]) -> str:
    """What to change so that no layer of those kinds is int8: do not include opt-in kinds, ignore the others."""
    known = {kind.name for kind in KINDS}
    ignored = [kind for kind in kinds if kind in known and kind not in OPT_IN_TARGETS]
    classes = [kind for kind in kinds if kind not in known and kind not in OPT_IN_TARGETS]
    ways = [f"with ignore={ignored}"] if ignored else []
    if classes:
        ways.append(f"with the layers of class {', '.join(classes)} ignored by name")
    if ways:
        ways[0] = f"quantize {ways[0]}"
    if any(kind in OPT_IN_TARGETS for kind in kinds):
        ways.append("include no embedding, nor a head that shares its weight")
    return " and ".join(ways)


def _described(model: nn.Module, on_disk: OnDisk | None = None) -> tuple[dict[str, tuple[str, Scheme]], list[str]]:
    """The layers of a quantized model that hold codes, as `quantization_config` takes them, and names of those that do
    not. Each weight of an expert is a layer of its own on disk."""
    layers = _int8_layers(model)
    owners = {
        name: (layer.replaces, layer.scheme)
        for name, layer in layers.items()
        if layer.codes() and not isinstance(layer, QuantExperts)
    }
    routed = routers(model)  # vLLM has linear layers in their place, transformers may not
    for name, part in expert_parts(model, on_disk).items():
        stack = layers.get(part.layer)
        if stack is not None:
            owners[name.rpartition(".")[0]] = (part.kind(stack.replaces), stack.scheme)
    others = [
        name
        for name, module in model.named_modules()
        if kind_of(module) is LINEAR
        or name in routed
        or (name in layers and name not in owners and not isinstance(module, QuantExperts))
    ]
    return owners, others


def _int8_layers(model: nn.Module) -> dict[str, QuantModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of a model that is to be stored: a float tensor, or (with a scale) the codes of a weight.

    dtype: stored dtype of the float tensor, or of the scales. scale, scheme: of codes. input_scale: fp32 [1], for
        static inputs. rows: int64 [n], for codes [E, N, K] the rows (of E * N) that are stored, as a weight [n, K].
    """

    tensor: Tensor
    dtype: torch.dtype
    scale: Tensor | None = None
    scheme: Scheme | None = None
    input_scale: Tensor | None = None
    rows: Tensor | None = None

    def plan(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that are stored for it: name -> (dtype, shape)."""
        shape = tuple(self.tensor.shape)
        if self.scale is None or self.scheme is None:
            return {name: (self.dtype, shape)}
        if self.rows is not None:
            n, k = len(self.rows), shape[-1]
            return layout.stored_layout(name, (n, k), (n, 1), self.dtype, self.scheme)
        return layout.stored_layout(name, shape, tuple(self.scale.shape), self.dtype, self.scheme)

    def encode(self, name: str) -> dict[str, Tensor]:
        """The tensors of `plan`."""
        if self.scale is None or self.scheme is None:
            return {name: self.tensor}
        codes, scale = self.tensor, self.scale
        if self.rows is not None:
            rows = self.rows.to(codes.device)
            codes, scale = codes.flatten(0, 1)[rows], scale.flatten(0, 1)[rows]
        return layout.encode(name, codes, scale, self.dtype, self.scheme, self.input_scale)


def _stored_experts(model: nn.Module, on_disk: OnDisk | None) -> dict[str, _Stored]:
    """Name on disk -> each 2-D weight of the int8 experts."""
    layers = _int8_layers(model)
    stored = {}
    for name, part in expert_parts(model, on_disk).items():
        if layer := layers.get(part.layer):
            codes, scale = layer.codes_and_scale(part.short)
            stored[name] = _Stored(codes, layer.float_dtype, scale, layer.scheme, rows=part.rows)
    return stored


def _stored(model: nn.Module) -> dict[str, _Stored]:
    """Name in the model -> what is stored, in the order of the model: codes with scales, float tensors, shared ones
    once. Weights of int8 experts are left out."""
    codes: dict[str, _Stored] = {}
    scales: set[str] = set()
    for prefix, layer in _int8_layers(model).items():
        if isinstance(layer, QuantExperts):
            scales |= {f"{prefix}.{name}" for name in (*layer.quantized_params, *layer.scale_names())}
            continue
        input_scale = layer.input_scale if isinstance(layer, StaticQuantLinear) else None
        for param, (weight, scale) in layer.codes().items():
            codes[f"{prefix}.{param}"] = _Stored(weight, layer.float_dtype, scale, layer.scheme, input_scale)
        scales |= {f"{prefix}.{name}" for name in layer.scale_names()}
    state = model.state_dict()
    _refuse_what_is_no_dense_tensor(state)
    left_out = scales | _copies(state, getattr(model, "all_tied_weights_keys", None) or {})
    return {
        name: codes.get(name) or _Stored(tensor, tensor.dtype) for name, tensor in state.items() if name not in left_out
    }


def _refuse_what_is_no_dense_tensor(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError: safetensors holds nothing else."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: is a {type(value).__name__} in the model's state_dict, expected a tensor: safetensors holds "
                "nothing else; save it apart, and have get_extra_state return a tensor or nothing"
            )
        if value.layout != torch.strided:
            raise CheckpointError(
                f"{name}: is of layout {value.layout}, expected a dense tensor: safetensors holds nothing else; make "
                "it dense, or, if the model makes it anew, a buffer that is not saved (persistent=False)"
            )


def _renamed(
    tensors: dict[str, _Stored], on_disk: OnDisk | None
) -> tuple[dict[str, _Stored], dict[str, str], list[str]]:
    """(`tensors` by their names on disk; name of a layer in the model -> on disk, where they differ; names of the
    tensors that float ones were merged or cut into)."""
    if on_disk is None:
        return tensors, {}, []
    merged = _merged(tensors, on_disk)
    origin = {id(stored.tensor): name for name, stored in tensors.items()}
    renamed: dict[str, _Stored] = {}
    names: dict[str, str] = {}
    parts: list[str] = []
    for name, tensor in on_disk({n: stored.tensor for n, stored in tensors.items() if n not in merged}).items():
        before = origin.get(id(tensor))
        if before is None:
            parts.append(name)
        elif before != name:
            names[before.rpartition(".")[0]] = name.rpartition(".")[0]
        renamed[name] = tensors[before] if before else _Stored(tensor, tensor.dtype)
    return renamed | merged, names, parts


def _merged(tensors: dict[str, _Stored], on_disk: OnDisk) -> dict[str, _Stored]:
    """The tensors of int8 layers that the library would merge into another one on disk (q, k and v that are fused
    there), and those that would be merged with them. Codes cannot be merged, so these keep their names of the model."""
    empty = {name: torch.empty_like(stored.tensor, device="meta") for name, stored in tensors.items()}
    kept = {id(tensor) for tensor in on_disk(empty).values()}
    lost = [name for name, tensor in empty.items() if id(tensor) not in kept]
    places = {name: frozenset(on_disk({name: empty[name]})) for name in lost}
    int8 = {name.rpartition(".")[0] for name, stored in tensors.items() if stored.scale is not None}
    with_codes = {place for name, place in places.items() if name.rpartition(".")[0] in int8}
    return {name: tensors[name] for name in lost if places[name] in with_codes}


def _copies(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> set[str]:
    """All names but one of each tensor that has several. tied: target -> source, if the model says which of the names
    is the tensor's own."""
    sharing: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            sharing.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(name)
    # A stable sort: of several sources the first of the model.
    return {name for names in sharing.values() for name in sorted(names, key=lambda name: name in tied)[1:]}


def _describe_model(model: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write the generation config and the companion files of the model's own checkpoint.

    tokenizer: if one is given, the checkpoint's is not copied.
    Returns: the content for config.json.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return {}
    source = str(getattr(config, "_name_or_path", "") or "")
    if source and Path(source).is_dir():
        copy_companions(Path(source), folder, only=("*",) if tokenizer is None else NOT_A_TOKENIZERS)
    described = json.loads(config.to_json_string())
    described.pop("quantization_config", None)
    described["architectures"] = [type(model).__name__]
    described["dtype"] = _dtype_of(model)
    # transformers looks in the files for one weight or two, vLLM only here. (Some encoder-decoders scale by this
    # setting.)
    scales = described.get("is_encoder_decoder", False)
    if described.get("tie_word_embeddings") and not scales and not _has_tied_head(model):
        described["tie_word_embeddings"] = False
    if getattr(model, "can_generate", lambda: False)() and model.generation_config is not None:
        # Not save_pretrained, which refuses settings that transformers loads with a warning, as Vicuna's.
        model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    return described


def _has_tied_head(model: Any) -> bool:
    """Whether output head and embedding share one table, int8 or float; also True if the model does not have both."""
    try:
        layers = model.get_output_embeddings(), model.get_input_embeddings()
        tables = [each.codes_and_scale()[0] if isinstance(each, QuantModule) else each.weight for each in layers]
    except (AttributeError, NotImplementedError):  # transformers' base classes ask a submodule that not every model has
        return True
    return bool(tables[0].data_ptr() == tables[1].data_ptr())


def _dtype_of(model: nn.Module) -> str:
    """The model's dtype for config.json: that of its first float weight. Without one, the narrowest of the dtypes of
    its first norm or bias (which may be fp32 in a 16-bit model) and those that the int8 weights had."""
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    weights = [parameter.dtype for parameter in floats if parameter.dim() > 1]
    others = [parameter.dtype for parameter in floats[:1]]
    others += [layer.float_dtype for layer in _int8_layers(model).values()]
    dtype = weights[0] if weights else min(others, key=lambda dtype: dtype.itemsize)
    return str(dtype).removeprefix("torch.")


def write_descriptions(
    folder: Path, config: dict[str, Any], report: Coverage, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """Write config.json and, beside it, the coverage. plan: what the weights are, as `CheckpointWriter` takes it."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    told = {**report.to_dict(), "weights": fingerprint(plan)}
    (folder / COVERAGE_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def fingerprint(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """Of the tensors of a checkpoint, name -> (dtype, shape): by it a coverage is known to be of the weights that it
    lies beside, which others may have replaced."""
    described = sorted((name, str(dtype), list(shape)) for name, (dtype, shape) in tensors.items())
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
