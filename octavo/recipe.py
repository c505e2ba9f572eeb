"""What to quantize, and how: a `Recipe` is a `Scheme` and the rules that say which layers get it.

    Recipe.of("w8a16")                                              every layer that the scheme covers
    Recipe.of("w8a16", ignore=["re:.*down_proj"])                   all but these
    Recipe.of("w8a16", include=["Embedding", "lm_head"])            also these, whose kinds are opt-in
    Recipe.of("w8a16", overrides={"model.layers.0": Scheme.of("w8a16", group_size=64)})

A pattern in `targets`, `ignore` or `overrides` is one of

    "model.layers.0.mlp"   the exact name of a module, or of a container above it
    "re:.*down_proj"       a regular expression, matched from the start of the module's name (as vLLM matches)
    "Linear"               a layer kind (targets and ignore only)
    predicate(name, module) -> bool     any callable (not in files)

This file imports nothing but the standard library, so that the command line can show help without loading torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from octavo.errors import RecipeError

__all__ = [
    "ATTENTION",
    "DEFAULT_TARGETS",
    "OPT_IN_TARGETS",
    "PRESETS",
    "READ_BY_OTHERS",
    "InputArgs",
    "Pattern",
    "Preset",
    "Recipe",
    "Scheme",
    "WeightArgs",
    "pattern_matches",
]

Pattern = str | Callable[[str, Any], bool]

DEFAULT_TARGETS = (
    "Linear",
    "Conv1D",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "MultiheadAttention",
    "LSTM",
    "GRU",
    "RNN",
    "LSTMCell",
    "GRUCell",
    "RNNCell",
    "Experts",
)
"""Layer kinds that a preset quantizes. `Conv1D` is transformers' transposed linear layer (GPT-2), `Experts` a stack of
experts with 3-D weights."""

OPT_IN_TARGETS = ("Embedding", "OutputHead")
"""Layer kinds quantized only when `include` (or `targets`) names them, or a module of theirs."""

READ_BY_OTHERS = ("Linear", "OutputHead")
"""Layer kinds that other readers of compressed-tensors (transformers, vLLM) load."""

ATTENTION = ("float", "int8")
"""How the two products of attention, Q K^T and P V, are computed."""

WeightGranularity = Literal["per_channel", "per_group", "per_tensor"]
InputGranularity = Literal["per_token", "per_tensor"]


def _check_choice(field: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise RecipeError(f"{field} is {value!r}, expected one of {', '.join(map(repr, valid))}")


@dataclasses.dataclass(frozen=True)
class WeightArgs:
    """How a weight [N, K] becomes int8.

    granularity: "per_channel" (one scale per row), "per_group" (one per `group_size` columns of a row) or "per_tensor"
        (one for the whole weight). Convolutions, embeddings and experts are always per_channel.
    Raises: RecipeError for an unknown granularity, or a group_size that does not fit it.
    """

    granularity: WeightGranularity = "per_channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_choice("weight.granularity", self.granularity, ("per_channel", "per_group", "per_tensor"))
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise RecipeError(
                f"weight.group_size is {self.group_size} with granularity {self.granularity!r}; "
                "per_group needs a group_size and the others have none"
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise RecipeError(f"weight.group_size is {self.group_size!r}, expected a positive whole number")


@dataclasses.dataclass(frozen=True)
class InputArgs:
    """How the input [..., K] of a linear layer becomes int8.

    granularity: "per_token" (one scale per row) or "per_tensor" (one for the whole input).
    dynamic: the scale is computed from each input. Otherwise calibration fixes it beforehand (static), which is
        possible only per_tensor.
    Raises: RecipeError for an unknown granularity, and for a static scale per_token.
    """

    granularity: InputGranularity = "per_token"
    dynamic: bool = True

    def __post_init__(self) -> None:
        _check_choice("input.granularity", self.granularity, ("per_token", "per_tensor"))
        if not isinstance(self.dynamic, bool):
            raise RecipeError(f"input.dynamic is {self.dynamic!r}, expected true or false")
        if self.granularity == "per_token" and not self.dynamic:
            raise RecipeError("input.dynamic is False with granularity 'per_token'; a static scale is 'per_tensor'")


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a scheme's name stands for. line: its description in `octavo quantize --help`."""

    weight: WeightArgs
    input: InputArgs | None
    line: str


_PER_TENSOR = WeightArgs("per_tensor")

PRESETS: dict[str, Preset] = {
    "w8a16": Preset(
        WeightArgs(), None, "int8 weights, a scale per output channel; activations stay in 16 (or 32) bits"
    ),
    "w8a8": Preset(WeightArgs(), InputArgs(), "int8 weights and int8 activations, a scale per token, found on the fly"),
    "w8a8-static": Preset(
        WeightArgs(), InputArgs("per_tensor", dynamic=False), "the same with one calibrated scale per layer's input"
    ),
    "o1": Preset(_PER_TENSOR, InputArgs(), "SmoothQuant-O1: weights per tensor, activations per token, dynamic"),
    "o2": Preset(_PER_TENSOR, InputArgs("per_tensor"), "SmoothQuant-O2: both per tensor, activations dynamic"),
    "o3": Preset(
        _PER_TENSOR, InputArgs("per_tensor", dynamic=False), "SmoothQuant-O3: both per tensor, activations static"
    ),
}
"""Preset schemes. O1 to O3: table 2 of SmoothQuant (Xiao et al., arXiv:2211.10438)."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What is int8 in a layer, and with which scales.

    name: of a preset.
    weight, input: None means the preset's own. w8a16 has float activations, so its `input` stays None. Only linear
        layers and experts get int8 inputs; in other kinds of layers only the weight is int8.
    Raises: RecipeError for an unknown name, for an `input` with w8a16, and for per_group weights with int8 inputs (no
        int8 kernel supports them).
    """

    name: str = "w8a16"
    weight: WeightArgs = None  # type: ignore[assignment]  # the preset's, see __post_init__
    input: InputArgs | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in PRESETS:
            raise RecipeError(f"unknown scheme {self.name!r}; valid: {', '.join(PRESETS)}")
        preset = PRESETS[self.name]
        if preset.input is None and self.input is not None:
            raise RecipeError(
                f"scheme {self.name!r} has float inputs, got input={self.input}; name 'w8a8' for int8 ones"
            )
        for field, args in (("weight", WeightArgs), ("input", InputArgs)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, args):
                raise RecipeError(f"{field} is {value!r}, expected {args.__name__}(...), or None for the preset's own")
            object.__setattr__(self, field, value or getattr(preset, field))
        if self.input and self.weight.group_size:
            raise RecipeError(
                f"scheme {self.name!r} has int8 inputs with weights per_group (group_size={self.weight.group_size}); "
                "expected weights per_channel or per_tensor, or the scheme 'w8a16'"
            )

    @classmethod
    def of(cls, name: str, *, group_size: int | None = None) -> Scheme:
        """The preset `name`, with its weights per_group if a `group_size` is given."""
        return cls(name) if group_size is None else cls(name, WeightArgs("per_group", group_size))

    @property
    def is_static(self) -> bool:
        """Whether inputs have a scale fixed by calibration."""
        return self.input is not None and not self.input.dynamic

    def as_dynamic(self) -> Scheme:
        """The same weights with dynamic inputs, one scale per token."""
        return Scheme("w8a8", self.weight)

    def __str__(self) -> str:
        preset = PRESETS[self.name]
        weight = f"weight {self.weight.granularity}" if self.weight != preset.weight else ""
        group = f"g{self.weight.group_size}" if self.weight.group_size else weight
        given = self.input if self.input != preset.input else None
        how = f"input {given.granularity} {'dynamic' if given.dynamic else 'static'}" if given else ""
        return " ".join(filter(None, (self.name, group, how)))

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types that `from_dict` reads back to an equal scheme."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: str | Mapping[str, Any]) -> Scheme:
        """A scheme from a preset name or `to_dict`'s form. An unknown key is a RecipeError listing the valid ones."""
        if isinstance(data, str):
            return cls(data)
        _check_keys("scheme", data, cls)
        parts: dict[str, Any] = {}
        for key, args in (("weight", WeightArgs), ("input", InputArgs)):
            if data.get(key) is not None:
                _check_keys(f"scheme.{key}", data[key], args)
                parts[key] = args(**data[key])
        return cls(data.get("name", "w8a16"), **parts)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A scheme and the rules for which layers get it.

    targets: layer kinds and patterns; a layer is quantized if one of them matches. Layers of an opt-in kind
        (`OPT_IN_TARGETS`) match only by their kind, or by a pattern that names the module itself.
    ignore: patterns and kinds that stay float; takes precedence over targets.
    overrides: (pattern, scheme) pairs; the first that matches a module replaces the recipe's scheme there.
    attention: "float", or "int8" for Q K^T and P V as int8 products in every attention of a transformers model.
    Raises: RecipeError for a value of the wrong type, an empty pattern or a regular expression that does not compile.
    """

    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    targets: tuple[Pattern, ...] = DEFAULT_TARGETS
    ignore: tuple[Pattern, ...] = ()
    overrides: tuple[tuple[Pattern, Scheme], ...] = ()
    attention: str = "float"

    def __post_init__(self) -> None:
        _check_choice("attention", self.attention, ATTENTION)
        if not isinstance(self.scheme, Scheme):
            raise RecipeError(f"scheme is {self.scheme!r}, expected a Scheme; Recipe.of('w8a16') takes a preset's name")
        for field in ("targets", "ignore"):
            value = getattr(self, field)
            _check_list(field, value)
            object.__setattr__(self, field, tuple(value))
            for pattern in getattr(self, field):
                _check_pattern(field, pattern)
        unique: dict[Pattern, Scheme] = {}
        for pattern, scheme in _pairs(self.overrides):
            _check_pattern("overrides", pattern)
            if not isinstance(scheme, Scheme):
                raise RecipeError(f"overrides[{pattern!r}] is {scheme!r}, expected a Scheme")
            unique.setdefault(pattern, scheme)  # of equal patterns the first counts
        object.__setattr__(self, "overrides", tuple(unique.items()))

    @classmethod
    def of(
        cls,
        scheme: str | Scheme | Recipe,
        *,
        ignore: Iterable[Pattern] = (),
        include: Iterable[Pattern] = (),
        overrides: Mapping[Pattern, Scheme] | None = None,
        group_size: int | None = None,
        attention: str | None = None,
    ) -> Recipe:
        """A recipe from a preset's name, a Scheme or another Recipe, with changes.

        ignore: added to the recipe's own.
        include: patterns and kinds that become targets besides the recipe's own.
        overrides: put before the recipe's own, so that they take precedence.
        group_size: columns of a weight that share a scale; only with a preset's name.
        attention: replaces the recipe's own, unless None.
        Raises: RecipeError as `Recipe` and `Scheme` do, and for a group_size with anything but a preset's name.
        """
        for field, value in (("ignore", ignore), ("include", include)):
            _check_list(field, value)
        if isinstance(scheme, str):
            scheme = Scheme.of(scheme, group_size=group_size)
        elif group_size is not None:
            raise RecipeError(f"group_size={group_size} goes with a preset's name; set it in the Scheme that was given")
        base = scheme if isinstance(scheme, Recipe) else cls(scheme)
        return dataclasses.replace(
            base,
            targets=(*base.targets, *include),
            ignore=(*base.ignore, *ignore),
            overrides=(*_pairs({} if overrides is None else overrides), *base.overrides),
            attention=base.attention if attention is None else attention,
        )

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All schemes that a layer may get: the recipe's own, then those of the overrides."""
        return (self.scheme, *(scheme for _, scheme in self.overrides))

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types that `from_dict` reads back to an equal recipe. Raises RecipeError for a predicate."""
        for field, patterns in self._patterns():
            for pattern in patterns:
                if not isinstance(pattern, str):
                    raise RecipeError(
                        f"{field} holds the predicate {pattern!r}, which a file cannot; use a 're:' pattern"
                    )
        return {
            "scheme": self.scheme.to_dict(),
            "targets": list(self.targets),
            "ignore": list(self.ignore),
            "overrides": {pattern: scheme.to_dict() for pattern, scheme in self.overrides},
            "attention": self.attention,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_dict`'s form; `scheme` may be a preset's name. An unknown key is a RecipeError."""
        _check_keys("recipe", data, cls)
        values = dict(data)
        if "scheme" in values:
            values["scheme"] = Scheme.from_dict(values["scheme"])
        overrides = values.get("overrides", {})
        if not isinstance(overrides, Mapping):
            raise RecipeError(f"recipe.overrides is {overrides!r}, expected a mapping of pattern to scheme")
        values["overrides"] = tuple((pattern, Scheme.from_dict(scheme)) for pattern, scheme in overrides.items())
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """A recipe from a .json, .yaml or .yml file. Raises RecipeError naming the file for anything wrong with it."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a BOM
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot read the recipe: {error}") from error
        if path.suffix == ".json":
            try:
                data = json.loads(text, object_pairs_hook=_object)
            except ValueError as error:
                raise RecipeError(f"{path}: not valid JSON: {error}") from error
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            class Loader(yaml.SafeLoader):
                def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
                    _check_unique([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
                    return super().construct_mapping(node, deep)

            try:
                data = yaml.load(text, Loader)
            except (yaml.YAMLError, ValueError) as error:  # ValueError: a key twice, a date or a number that is none
                raise RecipeError(f"{path}: not valid YAML: {error}") from error
        else:
            raise RecipeError(f"{path}: a recipe ends in .json, .yaml or .yml, got {path.suffix!r}")
        try:
            return cls.from_dict(data)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    def _patterns(self) -> tuple[tuple[str, tuple[Pattern, ...]], ...]:
        return (
            ("targets", self.targets),
            ("ignore", self.ignore),
            ("overrides", tuple(pattern for pattern, _ in self.overrides)),
        )


def pattern_matches(pattern: Pattern, name: str, module: Any = None) -> bool:
    """Whether a pattern (not a layer kind) matches the module called `name`: see this file's head."""
    if not isinstance(pattern, str):
        return bool(pattern(name, module))
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique([key for key, _ in pairs])
    return dict(pairs)


def _check_unique(keys: list[str]) -> None:
    """Raise ValueError for a duplicate key, of which JSON and YAML readers would silently take the last."""
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} is there twice, expected once; leave one out")


def _check_list(field: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Iterable):
        is_pattern = isinstance(value, str) or callable(value)
        fix = f"write [{value!r}]" if is_pattern else "write [] for none"
        raise RecipeError(f"{field} is {value!r}, expected a list of patterns; {fix}")


def _pairs(overrides: Any) -> tuple[tuple[Any, Any], ...]:
    """`overrides`, a mapping or a sequence of pairs, as pairs whose parts are not checked yet."""
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    pairs = tuple(items) if isinstance(items, Iterable) else (items,)
    if isinstance(overrides, str) or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise RecipeError(f"overrides is {overrides!r}, expected a mapping of pattern to Scheme")
    return tuple((pattern, scheme) for pattern, scheme in pairs)


def _check_pattern(field: str, pattern: Pattern) -> None:
    if callable(pattern):
        return
    if not isinstance(pattern, str) or not pattern.strip():
        raise RecipeError(f"{field} holds {pattern!r}, expected a module's name, 're:...' or a predicate")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError) as error:
            raise RecipeError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def _check_keys(where: str, data: Any, cls: type) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, expected a mapping")
    valid = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in data if key not in valid]
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}; valid: {', '.join(valid)}")
