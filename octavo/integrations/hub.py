"""From a path or a Hub id to a model, and from a float checkpoint to an int8 one.

A source is a local checkpoint folder, the id of a model on the Hugging Face Hub ("org/name"), or a .gguf file (read
and dequantized by transformers).
"""

from __future__ import annotations

import contextlib
import inspect
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import nn

from octavo import formats
from octavo.errors import CheckpointError, MissingExtra, OctavoError, QuantizeError
from octavo.feeding import Progress
from octavo.formats.checkpoint import PICKLE_SUFFIXES, CheckpointReader, check_shard_size, read_config
from octavo.formats.outputs import new_folder
from octavo.formats.saving import unwrapped
from octavo.formats.stream import quantize_files
from octavo.quantization.coverage import Coverage
from octavo.quantization.quantize import quantize as quantize_layers
from octavo.recipe import Pattern, Recipe, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "brings_its_code", "is_gguf", "load", "load_tokenizer", "no_progress_bar", "quantize", "quantize_checkpoint",
    "refuse_adapters_beside", "resolve", "save", "skeleton", "transformers_class",
]  # fmt: skip

_Arguments = ParamSpec("_Arguments")


def _with_transformers(core: Callable[_Arguments, Coverage]) -> Callable[_Arguments, Coverage]:
    """`core` is that of quantization/quantize.py; a recipe that asks for int8 attention gets it as well, float
    attention is made faster in decode, and transformers is told how to save its models.

    Whether the model's attention can be int8 is checked before anything is changed.
    """

    @wraps(core)
    def quantize(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Coverage:
        given = inspect.signature(core).bind(*args, **kwargs).arguments
        model, scheme = given["model"], given["scheme"]
        asked = given.get("attention") or (scheme.attention if isinstance(scheme, Recipe) else "float")
        if asked == "int8":
            _attention().check_int8_attention(model)
        report = core(*args, **kwargs)
        _adopt(model, asked)
        return report

    return quantize


quantize = _with_transformers(quantize_layers)


def _adopt(model: nn.Module, attention: str) -> None:
    """Of a model that became int8, what concerns transformers: how its models attend, and how they are saved.

    attention: "int8", or "float", which transformers models get faster in decode.
    """
    if attention == "int8":
        _attention().use_int8_attention(model)
    if not any(map(_is_pretrained, model.modules())):
        return
    from octavo.integrations.float_attention import use_float_attention
    from octavo.integrations.transformers import let_transformers_save

    if attention != "int8":
        use_float_attention(model)
    let_transformers_save(model)


def _is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of transformers, which need not be installed."""
    return hasattr(module, "save_pretrained") and hasattr(module, "base_model_prefix")


def load(
    path: str | Path, *, model: nn.Module | None = None, progress: Progress | None = None, **options: Any
) -> nn.Module:
    """Load a checkpoint, its int8 layers running as int8.

    path: a folder that `octavo.save` or `octavo.quantize_checkpoint` wrote, or another int8 compressed-tensors
        checkpoint that octavo can run; a folder, Hub id or .gguf file, with `model` one .safetensors file too. A float
        checkpoint loads as float.
    model: for what transformers cannot build, or is not to: the float model of the same structure, freshly built, on
        `meta` or not; it is changed in place and returned.
    progress: with `model` only (transformers shows its own): called with (layers done, number of layers).
    options: without `model` only: for `from_pretrained` of transformers (`dtype`, `device_map`, `trust_remote_code`,
        ...), which raises TypeError for one that it does not know.
    Returns: the model, in eval mode if transformers built it.
    Raises: CheckpointError for a source that is missing, damaged or in a format that octavo cannot run; MissingExtra
        if transformers is needed and not installed; OctavoError for an argument that would have no effect.
    """
    if model is not None:
        if options:
            raise OctavoError(
                f"{', '.join(options)} would have no effect: options are for transformers, which does not load what is "
                "given as model=; leave them out"
            )
        loaded = formats.load_into(resolve(path), model, **_names_on_disk(model), progress=progress)
        _adopt(loaded, _stored_attention(resolve(path)))
        return loaded
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
    config = _config(source, options.get("trust_remote_code", False))
    model_class = _model_class(config, source)
    if int8:
        from octavo.integrations.transformers import METHOD

        described = getattr(config, "quantization_config", None)
        if not described:
            raise CheckpointError(
                f"{source}: holds int8 codes, and its config.json has no quantization_config to say what they are; "
                "download or quantize the checkpoint again"
            )
        config.quantization_config = {**described, "quant_method": METHOD}
    try:
        loaded, info = model_class.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error, below
            **options,
        )
    except OSError as error:  # files of other names than transformers looks for
        raise CheckpointError(f"{source}: transformers cannot load it: {error}") from error
    _refuse_unfit(source, loaded, info)
    return loaded  # type: ignore[no-any-return]


def _names_on_disk(model: nn.Module) -> dict[str, Any]:
    """`rename`, `on_disk` and `conversions` of a model of transformers, for `formats`; none of another."""
    if not _is_pretrained(model):
        return {}
    from octavo.integrations import stored_names

    return {
        "rename": stored_names.renaming(model),
        "on_disk": partial(stored_names.on_disk, model),
        "conversions": partial(stored_names.conversions, model),
    }


def _refuse_unfit(source: Path, loaded: nn.Module, info: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a model that transformers filled up with random weights. info: of its loading."""
    other = [f"{name} (is {list(got)}, expected {list(needed)})" for name, got, needed in info["mismatched_keys"]]
    for what, names in (("are missing", info["missing_keys"]), ("have other shapes", other)):
        if names:
            raise CheckpointError(
                f"{source}: {len(names)} parameters of {type(loaded).__name__} {what}, such as {min(names)}; "
                "download or quantize the checkpoint again"
            )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a source, by transformers. Raises CheckpointError if it has none that can be loaded."""
    transformers = _transformers("to load a tokenizer")
    source = resolve(path)
    if is_gguf(source):
        with _reading_gguf(source, "its tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except _unreadable() as error:
        if "trust_remote_code" in str(error):  # an argument of transformers, which says what needs it
            raise CheckpointError(
                f"{path}: its tokenizer is in code that comes with the checkpoint, which is run only for who trusts "
                "it; in Python, load it by transformers' AutoTokenizer with trust_remote_code=True"
            ) from error
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {error}") from error


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Path:
    """Write a quantized model as a checkpoint folder: safetensors, config.json, tokenizer and generation files.

    model: has at least one int8 layer. For a transformers model the folder loads in transformers and vLLM. Of a model
        that torch.compile, DataParallel or DistributedDataParallel wrapped, the model itself is saved.
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
    on_disk, attention = None, "float"
    model = unwrapped(model)
    if _is_pretrained(model):
        _refuse_wrapped_parts(model)
        from octavo.integrations import stored_names
        from octavo.integrations.attention import attention_of

        on_disk, attention = partial(stored_names.on_disk, model), attention_of(model)
    return formats.save(
        model,
        folder,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        on_disk=on_disk,
        attention=attention,
        progress=progress,
    )


def refuse_adapters_beside(folder: Path) -> None:
    """Raise CheckpointError for adapters in a checkpoint's folder, which transformers would put on the model."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds adapters of PEFT; in Python, merge them into the model that they are for "
            "(merge_and_unload()) and save that, or take adapter_config.json away for the model without them"
        )


def _refuse_wrapped_parts(model: nn.Module) -> None:
    """Raise QuantizeError for a model whose layers have others around them: no class has weights of such names."""
    for name, module in model.named_modules():
        if name.endswith("._orig_mod"):
            raise QuantizeError(
                f"{name.removesuffix('._orig_mod')}: is wrapped by torch.compile, under which transformers would not "
                "find its weights; save the model first, or compile such parts in place (part.compile())"
            )
        if hasattr(module, "adapter_layer_names"):
            raise QuantizeError(
                f"{name}: has adapters of PEFT on it, under which transformers would not find the weight; merge them "
                "(merge_and_unload()), or save the model without them (unload()) and the adapters by PEFT's "
                "save_pretrained"
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
    model: a skeleton that says what the tensors are, for a checkpoint that transformers cannot build a model of, or is
        not to (nor for a .gguf file); on `meta` or not, it is not modified.
    max_shard_size: bytes, or "5GB".
    progress: called with (tensors done, number of tensors); of a .gguf file (layers done, number of layers).
    Returns: what became int8, what stayed float and why, in bytes on disk. Peak memory is about twice the largest
        tensor; the result is bit-identical to quantizing the loaded model and saving it. A .gguf file is quantized in
        memory: bytes are in memory, and the peak is that of the whole model.
    Raises: CheckpointError, RecipeError, QuantizeError as `octavo.quantize` and `octavo.save` do; QuantizeError (of a
        .gguf file CalibrateError) for static inputs too, whose scales only a model that runs can give; MissingExtra if
        transformers is needed and not installed; OctavoError for `model` with a .gguf file. Nothing is left of `dst`
        after an error.
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
    built = model if model is not None else skeleton(source, trust_remote_code=trust_remote_code)
    if recipe.attention == "int8":
        _attention().check_int8_attention(built)
    known = _names_on_disk(built)
    if model is None and built.config.dtype is not None:  # else transformers takes the dtype of the files
        from octavo.integrations.stored_names import loaded_dtypes

        known["dtype_of"] = loaded_dtypes(built)
    return quantize_files(source, dst, recipe, built, **known, max_shard_size=max_shard_size, progress=progress)


def _quantize_gguf(
    file: Path, dst: str | Path, recipe: Recipe, max_shard_size: int | str, progress: Progress | None
) -> Coverage:
    """The model is loaded, which takes a while, once all that can be refused without it has been looked at."""
    check_shard_size(max_shard_size)
    with new_folder(dst) as folder:
        tokenizer = load_tokenizer(file)
        with no_progress_bar():
            loaded = _load_gguf(file)
        report = quantize(loaded, recipe, progress=progress)
        save(loaded, folder, tokenizer=tokenizer, max_shard_size=max_shard_size)
    return report


# -- sources ----------------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_TIMEOUT = 10.0
"""Seconds that the Hub has to answer."""
_ABOUT_THE_HUB = (
    "revision", "code_revision", "subfolder", "cache_dir", "token", "force_download", "local_files_only",
)  # fmt: skip
"""Options of `from_pretrained` that say what is downloaded, or from where."""
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.tiktoken")
_UNWANTED = ("consolidated*", "original/*")
"""The same weights once more, as who made the model published them first (Mistral, gpt-oss)."""


def resolve(source: str | Path) -> Path:
    """The local folder or file of a source; a Hub id is downloaded (or found in the local cache).

    Raises: CheckpointError if there is no such path and the Hub does not have it or cannot be reached, and for a name
        that transformers would not take for that of a .gguf file.
    """
    path = Path(source)
    if path.exists():
        if path.suffix.lower() == ".gguf" and path.suffix != ".gguf" and path.is_file():
            raise CheckpointError(
                f"{path}: transformers reads .gguf files by their name; rename it to {path.with_suffix('.gguf').name}"
            )
        return path
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or path.suffix == ".gguf":
        raise CheckpointError(f"{source}: no such file or folder; expected a checkpoint, or the id of one on the Hub")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # Asked first and with a limit, because snapshot_download waits for a silent network without end.
        model = HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id}: neither a local path nor a model on the Hub that you may read; check the name, or log in with "
            "`hf auth login` for a private one"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{hub_id}: no such file or folder, and no id of the Hub either") from error
    except Exception as error:  # offline, a proxy, a server's error: what is raised differs between releases
        try:
            return Path(snapshot_download(hub_id, local_files_only=True))
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"{hub_id}: not a local path, not in the local cache, and the Hub cannot be reached; connect, or "
                f"download the model elsewhere and give its folder ({type(error).__name__}: {error})"
            ) from error
    _refuse_other_weights(hub_id, [file.rfilename for file in model.siblings or ()])
    try:
        return Path(
            snapshot_download(hub_id, revision=model.sha, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED))
        )
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{hub_id}: cannot be downloaded: {error}") from error


def _refuse_other_weights(hub_id: str, files: list[str]) -> None:
    """Raise CheckpointError for a model of the Hub whose weights are all of kinds that are not downloaded."""
    others = [file for file in files if file.endswith((*PICKLE_SUFFIXES, ".gguf"))]
    if others and not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{hub_id}: holds no safetensors, but {', '.join(others[:3])}; download one .gguf file (`hf download`) and "
            "give its path, or convert pickles once, with from_pretrained(id).save_pretrained(folder) of the model's "
            "class in transformers"
        )


def _transformers(what_for: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f"transformers is needed {what_for}: pip install 'octavo[hf]'") from error
    return transformers


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """While open, transformers draws no progress bars of its own."""
    _transformers("to keep its progress bars away")
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
    _transformers("for attention='int8', which switches the attention of its models")
    from octavo.integrations import attention

    return attention


def _stored_attention(folder: Path) -> str:
    """How the model of a checkpoint folder computes its attention: "float" or "int8"."""
    with CheckpointReader(folder) as reader:
        config = (reader.config or {}).get("quantization_config") or {}
    return config.get("attention", "float")  # type: ignore[no-any-return]


def _unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises for a config or a tokenizer that is not as it should be."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError


def _config(folder: Path, trust_remote_code: bool) -> Any:
    transformers = _transformers("to build the model; for a model of your own, pass model=")
    config = read_config(folder)
    if config is None:
        CheckpointReader(folder).close()  # what is no checkpoint at all is said to be that
        refuse_adapters_beside(folder)
        beside = folder.is_file() and (folder.parent / "config.json").is_file()
        fix = f"give the folder {folder.parent}, which has one, or, in Python," if beside else "in Python,"
        raise CheckpointError(
            f"{folder}: has no config.json, so what model it is of is not known; {fix} pass model=, a freshly built one"
        )
    if not trust_remote_code and brings_its_code(config):
        raise CheckpointError(
            f"{folder}: its model is not one of transformers' but in code that comes with the checkpoint, which is run "
            "only for who trusts it; in Python, pass trust_remote_code=True to octavo.load or "
            "octavo.quantize_checkpoint"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _unreadable() as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot read it: {error}; for a model that is not one of "
            "transformers', in Python, pass model=, a freshly built one"
        ) from error


def brings_its_code(config: Mapping[str, Any]) -> bool:
    """Whether the class of the model that a config.json is of is in code beside it, and not one of transformers'."""
    name = (config.get("architectures") or [""])[0]
    return bool(config.get("auto_map")) and transformers_class(name) is None


def transformers_class(name: object) -> Any:
    """The class of models that transformers has under that name; None if it has none."""
    transformers = _transformers("to build the model")
    found = getattr(transformers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _model_class(config: Any, folder: Path) -> Any:
    """The class that the config's first architecture names."""
    transformers = _transformers("to build the model")
    if not config.architectures:
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures is {config.architectures}, expected the model's class, such as "
            '["LlamaForCausalLM"]; write it there, or, in Python, pass model=, a freshly built one'
        )
    name = config.architectures[0]
    if (found := transformers_class(name)) is not None:
        return found
    for auto_class, reference in (getattr(config, "auto_map", None) or {}).items():
        if str(reference).endswith(f".{name}"):  # a tokenizer's is a list
            return getattr(transformers, auto_class)
    raise CheckpointError(
        f"{folder / 'config.json'}: architectures is {config.architectures}, which transformers "
        f"{transformers.__version__} does not have; upgrade transformers, or, in Python, pass model=, a freshly "
        "built one"
    )


def skeleton(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The transformers model of a checkpoint folder, on `meta`: its structure without any weights.

    Raises: CheckpointError for a folder without a config.json, or with that of a model that transformers does not have,
        or whose code comes with the checkpoint, unless `trust_remote_code` says to run that; MissingExtra without
        transformers.
    """
    folder = Path(folder)
    config = _config(folder, trust_remote_code)
    model_class = _model_class(config, folder)
    try:
        with torch.device("meta"):
            if hasattr(model_class, "_from_config"):
                model = model_class._from_config(config)
            else:
                model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    except _unreadable() as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build a {model_class.__name__} of it: {error}; correct "
            "architectures there, or, in Python, pass model=, a freshly built one"
        ) from error
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def is_gguf(source: Path) -> bool:
    """Whether a source is a .gguf file; a folder may be called so too."""
    return source.suffix == ".gguf" and source.is_file()


@contextlib.contextmanager
def _reading_gguf(file: Path, what: str) -> Iterator[None]:
    """Errors that transformers meets in a .gguf file as ours. struct.error: a header that ends too soon."""
    transformers = _transformers("to read a .gguf file")
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
