"""`octavo inspect PATH`: what is in a checkpoint, read from its files without building a model.

Which weights are float, and why, comes from the coverage that octavo saves beside its weights. For checkpoints written
by other tools it follows from their config: its targets and its list of layers to ignore.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import Verbs, a_path, new_verb
from octavo.errors import CheckpointError, MissingExtra, OctavoWarning
from octavo.recipe import pattern_matches
from octavo.tables import Table, human_bytes, human_percent, in_general

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.formats.checkpoint import CheckpointReader
    from octavo.quantization.coverage import Coverage, Row

__all__ = ["ScaleRange", "add_parser", "run"]


def add_parser(verbs: Verbs) -> None:
    """`octavo inspect`."""
    parser = new_verb(
        verbs, "inspect", "show what is in a checkpoint: schemes, bytes, what is float and why, the scales",
        "octavo inspect smollm2-int8", run,
    )  # fmt: skip
    parser.add_argument(
        "path", metavar="PATH", type=a_path, help="checkpoint folder, .safetensors file or Hub id; int8 or float"
    )


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Show what the checkpoint's headers, scales and config say."""
    from octavo.formats import int8_names
    from octavo.formats.checkpoint import CheckpointReader
    from octavo.integrations.local_files import resolve

    with terminal.progress(f"reading {args.path}") as progress, CheckpointReader(resolve(args.path)) as reader:
        config = (reader.config or {}).get("quantization_config") or {}
        dtypes = _dtypes(reader)
        problem = None
        try:
            int8 = list(int8_names(reader).values())
        except CheckpointError as error:
            int8, problem = [], str(error)
        problem = problem or (None if int8 else _unexplained(reader))
        report = _coverage(reader, int8, config) if int8 else None
        scales = _scale_ranges(reader, int8, progress)
        source = reader.path
    kind = "unreadable" if problem else "int8" if int8 else "float"
    return Answer(
        {
            "path": args.path,
            "kind": kind,
            "problem": problem,
            "quant_method": config.get("quant_method"),
            "format": config.get("format"),
            "bytes": sum(row["bytes"] for row in dtypes),
            "dtypes": dtypes,
            "schemes": _schemes(report) if report else [],
            "scales": [dataclasses.asdict(scale) for scale in scales],
            "coverage": report.to_dict() if report else None,
        },
        tuple(_shown(args.path, kind, problem, config, dtypes, report, scales, source)),
    )


def _shown(
    path: str,
    kind: str,
    problem: str | None,
    config: Mapping[str, Any],
    dtypes: list[dict[str, Any]],
    report: Coverage | None,
    scales: list[ScaleRange],
    source: Path,
) -> Iterable[Table | str]:
    size = human_bytes(sum(row["bytes"] for row in dtypes))
    tensors = sum(row["tensors"] for row in dtypes)
    if kind == "float":
        yield f"{path}: a float checkpoint, {size} in {tensors} tensors. No weight in it is int8."
    elif kind == "unreadable":
        yield f"{path}: quantized, {size} in {tensors} tensors, and not in a way that octavo can run: {problem}"
    else:
        layout = f"{config.get('format')} layout, quant_method {config.get('quant_method')}"
        said = layout if config else "no quantization_config beside it says its layout"
        yield f"{path}: an int8 checkpoint, {size} in {tensors} tensors; {said}."
    dtype_rows = tuple((row["dtype"], str(row["tensors"]), human_bytes(row["bytes"])) for row in dtypes)
    yield Table("Tensors on disk", ("dtype", "tensors", "bytes"), dtype_rows, "lrr")
    if report:
        yield _scheme_table(report)
        yield report.table()
    if scales:
        yield _scale_table(scales)
    if kind == "float":
        yield _how_to_quantize(path, source)


def _how_to_quantize(path: str, source: Path) -> str:
    """The command that quantizes this checkpoint, if the config that it needs exists. source: the folder or file at
    `path`."""
    from octavo.formats.checkpoint import read_config

    is_whole = source.is_dir() or source.name == "model.safetensors"
    folder = source if source.is_dir() else source.parent
    if (source / "adapter_config.json").is_file():
        return "To make it int8, merge the adapters of PEFT in it into their model first (merge_and_unload())."
    config = (read_config(folder) if is_whole else None) or {}
    given = path if source.is_dir() else str(folder)
    if _brings_its_code(config):
        return (
            "To make it int8, in Python, if you trust the code that comes with it:   "
            f"octavo.quantize_checkpoint({given!r}, 'OUT', 'w8a16', trust_remote_code=True)"
        )
    if config.get("architectures") or "_class_name" in config:  # of transformers, or of diffusers
        return f"To make it int8:   octavo quantize {shlex.quote(given)} OUT"
    return (
        "To make it int8, in Python, with the model that it is of:   "
        f"octavo.quantize_checkpoint({path!r}, 'OUT', 'w8a16', model=model)"
    )


def _brings_its_code(config: Mapping[str, Any]) -> bool:
    from octavo.integrations.model_classes import brings_its_code

    try:
        return brings_its_code(config)
    except MissingExtra:  # without transformers, nothing more can be said
        return False


def _dtypes(reader: CheckpointReader) -> list[dict[str, Any]]:
    counts: dict[str, list[int]] = {}
    for name in reader.names:
        info = reader.info(name)
        counts.setdefault(str(info.dtype).removeprefix("torch."), []).append(info.nbytes)
    ordered = sorted(counts.items(), key=lambda item: -sum(item[1]))
    return [{"dtype": dtype, "tensors": len(sizes), "bytes": sum(sizes)} for dtype, sizes in ordered]


def _unexplained(reader: CheckpointReader) -> str | None:
    """Why a checkpoint without int8 weights that octavo can read is not a float one either; None if it is one."""
    low = [name for name in reader.names if "weight" in name and reader.info(name).dtype.itemsize == 1]
    if not low:
        return None
    dtype = str(reader.info(low[0]).dtype).removeprefix("torch.")
    return (
        f"{low[0]} is {dtype}, one of {len(low)} weights of a byte an element, and neither a scale of its own nor a "
        "quantization_config says what it stands for."
    )


# -- what is int8, what is float, and why ---------------------------------------------------------------------------


def _coverage(reader: CheckpointReader, int8: list[str], config: Mapping[str, Any]) -> Coverage:
    """The coverage that octavo saved beside the weights, or one derived from names and config."""
    from octavo.formats import COVERAGE_FILE, stored_coverage
    from octavo.formats.loading import stored_parts
    from octavo.quantization.coverage import Coverage

    left = stored_coverage(reader)
    if left is not None:
        return left
    if (stale := reader.path / COVERAGE_FILE).is_file():  # of a folder: one shard alone never has its coverage
        warnings.warn(
            f"{stale}: tells of other weights, which were there before those that are there now; what follows is read "
            "from the weights and their config: remove the file",
            OctavoWarning,
            stacklevel=2,
        )
    parts = {part for name in int8 for part in stored_parts(reader, name)}
    floats = [name for name in reader.names if name not in parts and reader.info(name).dtype.is_floating_point]
    rows = [_int8_row(reader, name) for name in int8] + [_float_row(reader, name, config) for name in floats]
    return Coverage(tuple(sorted(rows, key=lambda row: _natural(row.name))))


def _int8_row(reader: CheckpointReader, name: str) -> Row:
    from octavo.formats.loading import codes_info, scheme_of, stored_shape
    from octavo.quantization.coverage import Row

    shape = stored_shape(reader, name)
    scale = reader.info(f"{name}_scale")
    after = codes_info(reader, name).nbytes + scale.nbytes
    return Row(name, "", shape, math.prod(shape) * scale.dtype.itemsize, after, str(scheme_of(reader, name)), None)


def _float_row(reader: CheckpointReader, name: str, config: Mapping[str, Any]) -> Row:
    from octavo.quantization.coverage import Row

    info = reader.info(name)
    return Row(name, "", info.shape, info.nbytes, info.nbytes, None, _why_float(name, info.shape, config))


def _why_float(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> str:
    if sum(size > 1 for size in shape) <= 1:
        return "1-D: biases and norms stay float"
    module = name.rpartition(".")[0]
    for pattern in config.get("ignore") or ():
        if pattern_matches(pattern, module):
            return f"the config ignores {pattern!r}"
    groups = (config.get("config_groups") or {}).values()
    targets = sorted({target for group in groups for target in group.get("targets") or ()})
    shown = ", ".join(targets[:3]) + (f" and {len(targets) - 3} more" if len(targets) > 3 else "")
    return f"not among the config's targets ({shown})"


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _schemes(report: Coverage) -> list[dict[str, Any]]:
    """A row for each scheme, and one for float weights: parameters and bytes."""
    lines: dict[str, dict[str, Any]] = {}
    for row in report.rows:
        line = lines.setdefault(
            row.scheme or "float", {"scheme": row.scheme, "parameters": 0, "bytes_before": 0, "bytes": 0}
        )
        line["parameters"] += 1
        line["bytes_before"] += row.bytes_before
        line["bytes"] += row.bytes_after
    return sorted(lines.values(), key=lambda line: -line["bytes_before"])


def _scheme_table(report: Coverage) -> Table:
    rows = tuple(
        (
            line["scheme"] or "float",
            str(line["parameters"]),
            human_bytes(line["bytes_before"]),
            human_bytes(line["bytes"]),
            human_percent(line["bytes_before"] / report.bytes_before if report.bytes_before else 0.0),
        )
        for line in _schemes(report)
    )
    return Table("Schemes", ("scheme", "parameters", "float bytes", "bytes now", "of the float bytes"), rows, "lrrrr")


# -- scales ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScaleRange:
    """The scales of one dtype in a family of weights (weights whose names differ in numbers only).

    zero, subnormal, negative, not_finite: how many scales are wrong in that way. A scale that is subnormal in the dtype
    it is stored in has lost bits. ones: how many are exactly 1, the scale of a row of zeros.
    """

    family: str
    tensors: int
    dtype: str
    count: int
    minimum: float
    median: float
    maximum: float
    zero: int
    subnormal: int
    negative: int
    not_finite: int
    ones: int


def _scale_ranges(reader: CheckpointReader, int8: list[str], progress: Any) -> list[ScaleRange]:
    import torch

    families: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for done, name in enumerate(int8, 1):
        stored = reader.tensor(f"{name}_scale")
        families.setdefault((in_general(name), stored.dtype), []).append(stored)
        progress(done, len(int8))
    ranges = []
    for (family, dtype), tensors in families.items():
        scale = torch.cat([tensor.flatten().double() for tensor in tensors])
        if not scale.numel():
            continue
        tiny = torch.finfo(dtype).tiny if dtype.is_floating_point else 0
        ranges.append(
            ScaleRange(
                family,
                len(tensors),
                str(dtype).removeprefix("torch."),
                scale.numel(),
                scale.min().item(),
                scale.median().item(),
                scale.max().item(),
                zero=int((scale == 0).sum()),
                subnormal=int(((scale != 0) & (scale.abs() < tiny)).sum()),
                negative=int((scale < 0).sum()),
                not_finite=int((~scale.isfinite()).sum()),
                ones=int((scale == 1).sum()),
            )
        )
    return ranges


def _scale_table(scales: list[ScaleRange]) -> Table:
    rows = tuple(
        (
            f"{scale.family}  x{scale.tensors}" if scale.tensors > 1 else scale.family,
            f"{scale.minimum:.3g}",
            f"{scale.median:.3g}",
            f"{scale.maximum:.3g}",
            _oddities(scale),
        )
        for scale in scales
    )
    return Table("Scales", ("weight", "min", "median", "max", "odd"), rows, "lrrrl")


def _oddities(scale: ScaleRange) -> str:
    counts = {
        "zero": scale.zero,
        "subnormal": scale.subnormal,
        "negative": scale.negative,
        "NaN or inf": scale.not_finite,
        "exactly 1 (rows of zeros)": scale.ones,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
