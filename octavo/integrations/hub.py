"""From a path or a Hub id to a model, and from a float checkpoint to an int8 one.

A source is a local checkpoint folder, the id of a model on the Hugging Face Hub ("org/name"), or a .gguf file (read
and dequantized by transformers). The models in them are those of transformers and of diffusers.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn

from octavo import formats
from octavo.errors import CheckpointError, MissingExtra, OctavoError
from octavo.feeding import Progress, check_module
from octavo.formats.checkpoint import CheckpointReader, check_shard_size, read_config
from octavo.formats.outputs import new_folder
from octavo.formats.saving import unwrapped
from octavo.formats.stream import quantize_files
from octavo.integrations.local_files import is_gguf, refuse_adapters_beside, resolve
from octavo.integrations.model_classes import config_of, import_transformers, model_class_of, skeleton, unreadable
from octavo.quantization.coverage import Coverage
from octavo.quantization.quantize import quantize as quantize_layers
from octavo.recipe import Pattern, Recipe, Scheme

__all__ = [
    "load",
    "load_tokenizer",
    "no_progress_bar",
    "prepare_for_library",
    "quantize",
    "quantize_checkpoint",
    "save",
]

_Arguments = ParamSpec("_Arguments")

_ABOUT_THE_HUB = (
    "revision", "code_revision", "subfolder", "cache_dir", "token", "force_download", "local_files_only",
)  # fmt: skip
"""Options of `from_pretrained` that say what is downloaded, or from where."""


def _with_libraries(core: Callable[_Arguments, Coverage]) -> Callable[_Arguments, Coverage]:
    """`octavo.quantize`: `core`, which is that of quantization/quantize.py, and what models of transformers and
    diffusers need besides (`prepare_for_library`). Whether a model's attention can be int8, and what the libraries
    need is there, is checked before anything is changed."""

    @wraps(core)
    def quantize(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Coverage:
        given = inspect.signature(core).bind(*args, **kwargs).arguments
        model, scheme = given["model"], given["scheme"]
        asked = given.get("attention")
        if asked is None:
            asked = scheme.attention if isinstance(scheme, Recipe) else "float"
        if asked == "int8":
            _attention().check_int8_attention(model)
        if _has_parts_of_diffusers(model):
            _diffusers()
        report = core(*args, **kwargs)
        prepare_for_library(model, asked)
        return report

    return quantize


quantize = _with_libraries(quantize_layers)


def prepare_for_library(model: nn.Module, attention: str) -> None:
    """Prepare a model that has become int8 for the libraries that its parts are from: `save_pretrained` writes int8.

    The attention of transformers' models is switched to that of this package: int8 attention, or for attention="float"
    a faster float attention.
    """
    if _has_parts_of_diffusers(model):
        _diffusers()  # its import is all that it takes
    if attention == "int8":
        _attention().use_int8_attention(model)
    if not any(map(_is_of_transformers, model.modules())):
        return
    from octavo.integrations.float_attention import use_float_attention
    from octavo.integrations.transformers import let_transformers_save

    if attention != "int8":
        use_float_attention(model)
    let_transformers_save(model)


def _is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of transformers, which need not be installed."""
    return hasattr(module, "save_pretrained") and hasattr(module, "base_model_prefix")


def _is_of_transformers(module: nn.Module) -> bool:
    """Whether it is a model of transformers or, as a block, a part of one."""
    return _is_pretrained(module) or type(module).__module__.startswith("transformers.")


def _has_parts_of_diffusers(model: Any) -> bool:
    """Whether it is a model of diffusers, contains one or is, as a block, a part of one."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(type(module).__module__.startswith("diffusers.") or _is_of_diffusers(module) for module in modules)


def _is_of_diffusers(module: nn.Module) -> bool:
    """Whether it is a model of diffusers, which need not be installed."""
    base = sys.modules.get("diffusers.models.modeling_utils")
    return base is not None and isinstance(module, base.ModelMixin)


def _diffusers() -> Any:
    """octavo.integrations.diffusers. Raises: MissingExtra where the package is not installed."""
    try:
        from octavo.integrations import diffusers
    except ImportError as error:
        raise MissingExtra(
            f"diffusers and transformers are needed for models of diffusers: pip install 'octavo[diffusers]' ({error})"
        ) from error
    return diffusers


def _diffusers_config(source: Path) -> dict[str, Any] | None:
    """config.json's content if it is of a model of diffusers; else None."""
    config = read_config(source)
    return config if config is not None and "_class_name" in config else None


def load(
    path: str | Path, *, model: nn.Module | None = None, progress: Progress | None = None, **options: Any
) -> nn.Module:
    """Load a checkpoint, its int8 layers running as int8.

    path: a folder that `octavo.save` or `octavo.quantize_checkpoint` wrote, or another int8 compressed-tensors
        checkpoint that octavo can run; a folder, Hub id or .gguf file, with `model` one .safetensors file too. A float
        checkpoint loads as float.
    model: for what these libraries cannot build, or are not to: the float model of the same structure, freshly built,
        on `meta` or not; it is changed in place and returned. One that torch.compile or DataParallel wrapped stays so.
    progress: with `model` only (transformers shows its own): called with (layers done, number of layers).
    options: without `model` only: for `from_pretrained` of the model's library (`dtype`, `device_map`,
        `trust_remote_code`, ...); transformers raises TypeError for one that it does not know.
    Returns: the model, in eval mode if transformers or diffusers built it.
    Raises: CheckpointError for a source that is missing, damaged or in a format that octavo cannot run; MissingExtra
        if transformers or diffusers is needed and not installed; OctavoError for an argument that would have no effect.
    """
    if model is not None:
        if options:
            raise OctavoError(
                f"{', '.join(options)} would have no effect: options are for transformers, which does not load what is "
                "given as model=; leave them out"
            )
        check_module(model)
        source, inner = resolve(path), unwrapped(model)
        formats.load_into(source, inner, **_names_on_disk(inner), progress=progress)
        prepare_for_library(inner, _stored_attention(source))
        return model
    if progress is not None:
        raise OctavoError(
            "progress would never be called: without model=, transformers loads and shows its own; leave it out"
        )
    if about_the_hub := [name for name in options if name in _ABOUT_THE_HUB]:
        raise OctavoError(
            f"{', '.join(about_the_hub)} would have no effect: transformers gets a local folder, which of a Hub id is "
            "that of the main revision; leave it out, or download what you mean by huggingface_hub.snapshot_download "
            "and give the folder with its config.json"
        )
    source = resolve(path)
    if is_gguf(source):
        return _load_gguf(source, **options)
    with CheckpointReader(source) as reader:
        int8 = formats.int8_names(reader)
    if int8:
        refuse_adapters_beside(source)
    if (diffusers_config := _diffusers_config(source)) is not None:
        model_class = _diffusers().model_class_of(diffusers_config, source / "config.json")
        loaded, info = model_class.from_pretrained(source, output_loading_info=True, **options)
        _refuse_unfit(source, loaded, info)
        return loaded  # type: ignore[no-any-return]
    config = config_of(source, options.get("trust_remote_code", False))
    model_class = model_class_of(config, source)
    if int8:
        from octavo.integrations.transformers import METHOD

        described = getattr(config, "quantization_config", None)
        if not described:
            raise CheckpointError(
                f"{source}: holds int8 codes, and its config.json has no quantization_config to say what they are; "
                "download or quantize the checkpoint again"
            )
        config.quantization_config = {**described, "quant_method": METHOD.value}
    try:
        loaded, info = model_class.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error, below
            **options,
        )
    except OctavoError:
        raise
    except unreadable() as error:
        skeleton(source, trust_remote_code=options.get("trust_remote_code", False))  # tells of a config at fault
        if isinstance(error, OSError):  # files of other names than transformers looks for
            raise CheckpointError(f"{source}: transformers cannot load it: {error}") from error
        raise
    _refuse_unfit(source, loaded, info)
    return loaded  # type: ignore[no-any-return]


def _names_on_disk(model: nn.Module) -> dict[str, Any]:
    """`rename`, `on_disk` and `conversions` of a model of transformers or diffusers, for `formats`; none of another."""
    if _is_of_diffusers(model):
        return {"rename": _diffusers().renaming(model)}
    if not _is_pretrained(model):
        return {}
    from octavo.integrations import stored_names

    return {
        "rename": stored_names.renaming(model),
        "on_disk": partial(stored_names.on_disk, model),
        "conversions": partial(stored_names.conversions, model),
    }


def _refuse_unfit(source: Path, loaded: nn.Module, info: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a model with weights that are not the files'. info: of its loading."""
    other = [f"{name} (is {list(got)}, expected {list(needed)})" for name, got, needed in info["mismatched_keys"]]
    for what, names in (("are missing", info["missing_keys"]), ("have other shapes", other)):
        if names:
            raise CheckpointError(
                f"{source}: {len(names)} parameters of {type(loaded).__name__} {what}, such as {min(names)}; "
                "download or quantize the checkpoint again"
            )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a source, by transformers. Raises CheckpointError if it has none that can be loaded."""
    transformers = import_transformers("to load a tokenizer")
    source = resolve(path)
    if is_gguf(source):
        with _reading_gguf(source, "its tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if source.is_file():
        raise CheckpointError(
            f"{path}: is a file of weights, expected the folder that a tokenizer is in too; give {source.parent}"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except unreadable() as error:
        if "trust_remote_code" in str(error):  # an argument of transformers, which says what needs it
            raise CheckpointError(
                f"{path}: its tokenizer is in code that comes with the checkpoint, which is run only for who trusts "
                "it; in Python, load it by transformers' AutoTokenizer with trust_remote_code=True"
            ) from error
        if not any(_OF_A_TOKENIZER.search(file.name) for file in source.iterdir()):
            raise CheckpointError(
                f"{path}: its tokenizer cannot be loaded: the folder holds none (no tokenizer.json, nor another's "
                "files); copy that of the model that it was made of there"
            ) from error
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {error}") from error


_OF_A_TOKENIZER = re.compile(r"^(tokenizer|vocab|merges|spiece)|\.(model|tiktoken)$")
"""Names of the files that tokenizers are made of."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Path:
    """Write a quantized model as a checkpoint folder: safetensors, config.json, tokenizer and generation files.

    model: has at least one int8 layer. For a transformers model the folder loads in transformers and vLLM, for one of
        diffusers in diffusers where octavo is. Of a model that torch.compile, DataParallel or DistributedDataParallel
        wrapped, the model itself is saved.
    folder: must not exist (an empty one may).
    tokenizer: tokenizer or processor to save along. The files beside the model's own checkpoint are copied, if it was
        loaded from a local folder: all without a tokenizer, else code and the settings of processors.
    max_shard_size: bytes, or "5GB".
    progress: called with (tensors written, number of tensors).
    Returns: the folder's path.
    Raises: QuantizeError if no layer is int8, and for a transformers model with adapters of PEFT on it, or parts that
        torch.compile wrapped; CheckpointError if the folder exists or cannot be written whole.
    Warns: OctavoWarning if a layer's kind keeps transformers and vLLM from loading the folder.
    """
    on_disk, attention, of_library = None, "float", {}
    model = unwrapped(model)
    if _is_of_diffusers(model):
        of_library = {"config": _diffusers().config_of(model), "stem": _diffusers().STEM}
    if _is_pretrained(model):
        from octavo.integrations import stored_names
        from octavo.integrations.attention import attention_of

        stored_names.refuse_wrapped_parts(model)
        on_disk, attention = partial(stored_names.on_disk, model), attention_of(model)
    return formats.save(
        model,
        folder,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        on_disk=on_disk,
        attention=attention,
        progress=progress,
        **of_library,
    )


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme | Recipe,
    *,
    ignore: Iterable[Pattern] = (),
    include: Iterable[Pattern] = (),
    overrides: Mapping[Pattern, Scheme] | None = None,
    group_size: int | None = None,
    attention: str | None = None,
    model: nn.Module | None = None,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Coverage:
    """Quantize a float checkpoint into the new folder `dst`, one tensor at a time, without building the model.

    src: a folder or Hub id with safetensors, with `model` one .safetensors file too, or a .gguf file (which is
        dequantized in memory, in bf16).
    dst: must not exist (an empty folder may).
    scheme, ignore, include, overrides, group_size, attention: as for `octavo.quantize`.
    model: a skeleton that says what the tensors are, for a checkpoint that transformers and diffusers cannot build a
        model of, or are not to (nor for a .gguf file); on `meta` or not, it is not modified.
    max_shard_size: bytes, or "5GB".
    progress: called with (tensors done, number of tensors); of a .gguf file (layers done, number of layers).
    Returns: what became int8, what stayed float and why, in bytes on disk. Peak memory is about twice the largest
        tensor; the result is bit-identical to quantizing the loaded model and saving it. A .gguf file is quantized in
        memory: bytes are in memory, and the peak is that of the whole model.
    Raises: CheckpointError, RecipeError, QuantizeError as `octavo.quantize` and `octavo.save` do; QuantizeError (of a
        .gguf file CalibrateError) for static inputs too, whose scales only a model that runs can give; MissingExtra if
        transformers or diffusers is needed and not installed; OctavoError for `model` with a .gguf file. Nothing is
        left of `dst` after an error.
    """
    recipe = Recipe.of(
        scheme, ignore=ignore, include=include, overrides=overrides, group_size=group_size, attention=attention
    )
    source = resolve(src)
    if is_gguf(source):
        if model is not None:
            raise OctavoError(f"model would have no effect: transformers builds that of {source}; leave it out")
        return _quantize_gguf(source, dst, recipe, max_shard_size, progress)
    refuse_adapters_beside(source)
    diffusers_config = _diffusers_config(source)
    if model is not None:
        built = model
    elif diffusers_config is not None:
        built = _diffusers().skeleton(source, diffusers_config)
    else:
        built = skeleton(source, trust_remote_code=trust_remote_code)
    if recipe.attention == "int8":
        _attention().check_int8_attention(built)
    known = _names_on_disk(built)
    if _is_of_diffusers(built):
        known["stem"] = _diffusers().STEM
    elif model is None and built.config.dtype is not None:  # else transformers takes the dtype of the files
        from octavo.integrations.stored_names import loaded_dtypes

        known["dtype_of"] = loaded_dtypes(built)
    return quantize_files(source, dst, recipe, built, **known, max_shard_size=max_shard_size, progress=progress)


def _quantize_gguf(
    file: Path, dst: str | Path, recipe: Recipe, max_shard_size: int | str, progress: Progress | None
) -> Coverage:
    """Quantize a .gguf file through memory. All that can be refused is refused before the model is loaded, which is
    slow."""
    check_shard_size(max_shard_size)
    with new_folder(dst) as folder:
        tokenizer = load_tokenizer(file)
        with no_progress_bar():
            loaded = _load_gguf(file)
        report = quantize(loaded, recipe, progress=progress)
        save(loaded, folder, tokenizer=tokenizer, max_shard_size=max_shard_size)
    return report


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """While open, transformers draws no progress bars of its own."""
    import_transformers("to keep its progress bars away")
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), getattr(gguf, "tqdm", None)
    logging.disable_progress_bar()
    if bar is not None:  # tqdm's own, which transformers' switch does not reach
        gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _attention() -> Any:
    import_transformers("for attention='int8', which switches the attention of its models")
    from octavo.integrations import attention

    return attention


def _stored_attention(folder: Path) -> str:
    """How the model of a checkpoint folder computes its attention: "float" or "int8"."""
    with CheckpointReader(folder) as reader:
        return formats.stored_attention((reader.config or {}).get("quantization_config") or {})


@contextlib.contextmanager
def _reading_gguf(file: Path, what: str) -> Iterator[None]:
    """Errors that transformers meets in a .gguf file as ours. struct.error: a header that ends too soon."""
    transformers = import_transformers("to read a .gguf file")
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"{file}: reading it needs the gguf package: pip install 'octavo[hf]' ({error})") from error
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} cannot load {what}: {str(error).rstrip('.')}; if it is "
            "truncated or corrupt, download or copy it again"
        ) from error


def _load_gguf(file: Path, **options: Any) -> Any:
    with _reading_gguf(file, "it"):
        from transformers import AutoModelForCausalLM, GgufConfig

        options.setdefault("dtype", torch.bfloat16)
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True, ignore_mismatched_sizes=True,  # they are an error, below
            **options,
        )  # fmt: skip
    _refuse_unfit(file, model, info)
    model.config._name_or_path = ""  # the file's folder is not this model's checkpoint
    return model
