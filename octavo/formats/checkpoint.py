"""Sharded safetensors in and out, one tensor in memory at a time.

A checkpoint is a folder of

    config.json                              what the model is
    model.safetensors                        its tensors, or
    model-00001-of-00002.safetensors, ...    its tensors in shards, with
    model.safetensors.index.json             {"metadata": {"total_size": ...}, "weight_map": {tensor: shard}}
                                             (for "model" some libraries have a stem of their own)
    tokenizer.json, README.md, ...           companions: everything that is not weights

and a .safetensors file is [header's length: 8 bytes][header: JSON, padded with spaces to 8 bytes][data]. The header
says each tensor's dtype, shape and place in the data, so that all of it can be written before the first tensor
exists (`CheckpointWriter`), and one tensor can be read without touching the others (`CheckpointReader`).

Tensors are read with plain file reads. A memory-mapped file would do as well, but its pages count as resident memory
until it is unmapped: reading a 256 MiB shard tensor by tensor added 395 MiB to the peak memory through a mapping, and
32 MiB this way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import CheckpointError

__all__ = [
    "PICKLE_SUFFIXES",
    "CheckpointReader",
    "CheckpointWriter",
    "TensorInfo",
    "check_shard_size",
    "not_readable",
    "read_config",
]

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its shard's header describes it. `nbytes` is its size on disk in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class CheckpointReader:
    """The tensors of a checkpoint, read one at a time.

    path: a folder with model.safetensors, with model.safetensors.index.json and its shards, or with one set of
        safetensors under another name; or one .safetensors file, which then stands for itself alone.
    Raises: CheckpointError naming the file for a folder or file that is missing, a shard that is missing, truncated or
        corrupt, and an index that disagrees with its shards or leads out of the folder. All headers are read and
        checked here, so a damaged checkpoint is known before any work starts.

    names: the tensors, shard by shard, in the order of their bytes.
    config: config.json's content; None where there is none, and for a lone file.

    A context manager: leaving it closes the shards.
    """

    names: list[str]
    config: dict[str, Any] | None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.names = []
        self._infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        self._open_files: dict[Path, BufferedReader] = {}
        files, weight_map = _find_shards(self.path)
        for file in files:
            self._add_shard(file)
        if weight_map is not None:
            _check_weight_map(self.path, weight_map, self._infos)
        self.config = read_config(self.path)

    def _add_shard(self, file: Path) -> None:
        header, data_start = _read_header(file)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name in self._infos:
                raise CheckpointError(
                    f"{file}: holds tensor {name!r}, which {self._infos[name].file.name} holds too; "
                    "expected each tensor once: remove the shard that does not belong to this checkpoint"
                )
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is of dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}"
                )
            begin, end = entry["data_offsets"]
            self._infos[name] = TensorInfo(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), end - begin, file)
            self._starts[name] = data_start + begin
            self.names.append(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of tensor `name`, from the header. Raises CheckpointError for an unknown name."""
        if name not in self._infos:
            known = f"it has {len(self.names)}, such as {self.names[:3]}"
            raise CheckpointError(f"{self.path}: has no tensor {name!r}; {known}")
        return self._infos[name]

    def tensor(self, name: str) -> Tensor:
        """Read tensor `name`, of the dtype and shape in `info(name)`, into new CPU memory.

        Raises: CheckpointError for an unknown name, and for a shard that became shorter or unreadable meanwhile.
        """
        info = self.info(name)
        data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")  # whatever the caller's default is
        try:
            if info.file not in self._open_files:
                self._open_files[info.file] = info.file.open("rb")
            file = self._open_files[info.file]
            file.seek(self._starts[name])
            got = file.readinto(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot read tensor {name!r}: {error.strerror}") from error
        if got != info.nbytes:
            raise CheckpointError(
                f"{info.file}: ends within tensor {name!r}: got {got} bytes, expected {info.nbytes}; "
                "the file changed while it was read"
            )
        return data.view(info.dtype).view(info.shape)

    def close(self) -> None:
        """Close the shards. `names`, `info` and `config` stay."""
        for file in self._open_files.values():
            file.close()
        self._open_files.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _find_shards(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards that make up the checkpoint at `path`, and the index's tensor-to-shard map if it has one."""
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{path}: is not a .safetensors file, or a checkpoint's folder, but a pickle; read it with "
                "torch.load(file, weights_only=True): a state dict is for the model's load_state_dict, or for "
                "safetensors.torch.save_file"
            )
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: is not a .safetensors file, expected one, or a checkpoint's folder")
        return [path], None
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; expected a checkpoint's folder or a .safetensors file")
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"], None
    indexes = sorted(path.glob("*.safetensors.index*.json"))  # a variant's name is in it: ...index.fp16.json
    if path / "model.safetensors.index.json" in indexes:
        indexes = [path / "model.safetensors.index.json"]
    if len(indexes) == 1:
        weight_map = _read_weight_map(indexes[0])
        return [path / shard for shard in sorted(set(weight_map.values()))], weight_map
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not indexes:
        return files, None
    if files or indexes:
        found = ", ".join(file.name for file in (indexes or files)[:5])
        raise CheckpointError(
            f"{path}: holds several sets of weights ({found}) and neither model.safetensors nor "
            "model.safetensors.index.json to say which is meant; give the path of one .safetensors file"
        )
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path}: holds pickles ({', '.join(pickles[:3])}), expected safetensors; convert them once, with "
            "from_pretrained(path).save_pretrained(new_path) of the model's class in transformers, or with "
            "torch.load(file, weights_only=True) and safetensors.torch.save_file"
        )
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(
            f"{path}: holds no safetensors; for a .gguf file give its own path, such as {path / ggufs[0]}"
        )
    if (path / "model_index.json").is_file():
        models = sorted(file.parent.name for file in path.glob("*/*.safetensors"))
        raise CheckpointError(
            f"{path}: is a pipeline of several models, expected one; give that model's folder, such as "
            f"{path / models[0] if models else path / 'unet'}"
        )
    raise CheckpointError(f"{path}: holds no weights, expected model.safetensors or model.safetensors.index.json")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no usable weight_map, expected {{tensor's name: shard's file name}}")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # Not resolved: in the Hub's cache each file is a link that leads out of the folder, and rightly so.
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts or "\\" in shard or ":" in shard:
            raise CheckpointError(
                f"{index}: names the shard {shard!r}, which leads out of the folder, expected a file's name within it; "
                "do not trust this checkpoint"
            )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(shards)} shards are missing: {', '.join(missing[:3])}; "
            "download them again"
        )
    return weight_map


def _check_weight_map(folder: Path, weight_map: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        if name not in infos or infos[name].file != folder / shard:
            raise CheckpointError(
                f"{folder}: its index says that {shard} holds tensor {name!r}, and it does not; "
                "shards and index are of different versions: download the checkpoint again"
            )
    extra = [name for name in infos if name not in weight_map]
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors in its shards are not in its index, such as {extra[0]!r} in "
            f"{infos[extra[0]].file.name}; shards and index are of different versions: download the checkpoint again"
        )


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json's content; None where there is none.

    Raises: CheckpointError if it is no JSON object, or holds something else where octavo looks for a list or an object.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = _read_json(file)
    for key, kind, expected in (("quantization_config", dict, "an object"), ("architectures", list, "a list of names")):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{file}: {key} is {value!r}, expected {expected}; download the checkpoint again")
    return config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and where its data starts. Raises CheckpointError naming the file."""
    try:
        file.open("rb").close()  # safetensors reports a file without read permission as missing
    except OSError as error:
        raise not_readable(file, error) from error
    try:
        # safetensors checks that the header is sound and that the file is exactly as long as the header says.
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError), file.open("rb") as stream:
            if stream.read(24) == b"version https://git-lfs.":
                raise CheckpointError(
                    f"{file}: is a git-lfs pointer, expected the weights it stands for; run `git lfs pull` there"
                ) from error
        raise CheckpointError(
            f"{file}: is not a whole safetensors file ({error}); it is truncated or corrupt: download or copy it again"
        ) from error
    return header, 8 + length


def not_readable(file: Path, error: OSError) -> CheckpointError:
    """The error for a file that cannot be read, from the system's error."""
    return CheckpointError(f"{file}: cannot be read: {error.strerror}; change its permissions or get it again")


class CheckpointWriter:
    """Writes a planned set of tensors as safetensors into `folder`, from one tensor in memory at a time.

    folder: an existing folder, such as `new_folder` yields.
    plan: tensor's name -> (dtype, shape) of every tensor that will be written.
    max_shard_size: in bytes, or as "5GB"; a tensor that is larger gets a shard of its own.
    stem: what the files' names begin with.
    Raises: CheckpointError for an empty plan, a dtype that safetensors does not have, an invalid max_shard_size, and a
        disk without room for the plan.

    Shards are cut and named as huggingface_hub does, and their headers are written here. Within a shard tensors lie
    in the order of the plan, wider dtypes first, so that each starts at a multiple of its element size.
    A context manager: leaving it without an exception is `close`.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        max_shard_size: int | str = "5GB",
        stem: str = "model",
    ) -> None:
        self.folder = Path(folder)
        self._stem = stem
        self._plan = {name: (dtype, tuple(shape)) for name, (dtype, shape) in plan.items()}
        for name, (dtype, _) in self._plan.items():
            if dtype not in _DTYPE_NAMES:
                raise CheckpointError(f"tensor {name!r} is of dtype {dtype}, which safetensors cannot hold")
        if not self._plan:
            raise CheckpointError(f"{self.folder}: there is no tensor to write")
        split = _split(self._plan, max_shard_size, stem)
        self._shards = split.filename_to_tensors
        self._total_size = int(split.metadata["total_size"])
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = dict.fromkeys(self._plan)
        free = shutil.disk_usage(self.folder).free
        if free < self._total_size:
            raise CheckpointError(
                f"{self.folder}: the disk is full: {free / 1e6:.0f} MB are free, {self._total_size / 1e6:.0f} MB are "
                "needed; free some space or choose another disk"
            )
        for shard, names in self._shards.items():
            self._write_header(self.folder / shard, names)

    def _write_header(self, file: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        starts = {}
        for name in sorted(names, key=lambda name: -self._plan[name][0].itemsize):
            dtype, shape = self._plan[name]
            end = offset + _nbytes(dtype, shape)
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            starts[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
        self._places.update({name: (file, 8 + len(text) + start) for name, start in starts.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in any order. `tensor`: of the planned dtype and shape, any strides and device.

        Raises: CheckpointError for a name that is not planned or already written, another dtype or shape than planned,
            and a tensor on meta.
        """
        if name not in self._missing:
            why = "was written already" if name in self._plan else "is not in the plan"
            raise CheckpointError(f"{self.folder}: tensor {name!r} {why}, expected each planned tensor once")
        if (tensor.dtype, tuple(tensor.shape)) != self._plan[name]:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"planned was {self._plan[name][0]} {list(self._plan[name][1])}"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is on meta, without data; load the weights first")
        file, start = self._places[name]
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        del self._missing[name]

    def close(self) -> None:
        """Check that all planned tensors are there, and write the index if there are shards.

        Raises: CheckpointError naming planned tensors that were not written.
        """
        if self._missing:
            raise CheckpointError(
                f"{self.folder}: {len(self._missing)} of {len(self._plan)} planned tensors were not written, "
                f"such as {next(iter(self._missing))!r}"
            )
        if len(self._shards) > 1:
            weight_map = {name: self._places[name][0].name for name in self._plan}
            index = {"metadata": {"total_size": self._total_size}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is None:
            self.close()


def check_shard_size(max_shard_size: int | str) -> None:
    """Raise CheckpointError for an invalid `max_shard_size`, as `CheckpointWriter` does, but before the work."""
    _split({}, max_shard_size)


def _split(
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_size: int | str, stem: str = "model"
) -> Any:
    """How huggingface_hub splits the tensors into files. Raises CheckpointError for an invalid size."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        if not re.fullmatch(r"[1-9]\d*[A-Za-z]*", str(max_shard_size)):
            raise ValueError("it is not a positive whole number")
        return split_state_dict_into_shards_factory(
            dict(plan),
            get_storage_size=lambda planned: _nbytes(*planned),
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=int(max_shard_size) if str(max_shard_size).isdecimal() else max_shard_size,
        )
    except ValueError as error:
        raise CheckpointError(
            f"max_shard_size is {max_shard_size!r}, expected a number of bytes or a size such as '5GB': {error}"
        ) from error


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
