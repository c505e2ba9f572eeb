"""Recipes: what may be written, what is refused, and that what is written is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import RecipeError
from octavo.recipe import (
    DEFAULT_TARGETS,
    OPT_IN_TARGETS,
    PRESETS,
    InputArgs,
    Recipe,
    Scheme,
    WeightArgs,
    pattern_matches,
)

weights = st.sampled_from(["per_channel", "per_tensor"]).map(WeightArgs)
groups = st.integers(1, 4096).map(lambda size: WeightArgs("per_group", size))
inputs = st.builds(InputArgs, st.sampled_from(["per_token", "per_tensor"])) | st.just(InputArgs("per_tensor", False))
schemes = st.builds(Scheme, st.just("w8a16"), st.none() | weights | groups) | st.builds(
    Scheme, st.sampled_from([name for name in PRESETS if name != "w8a16"]), st.none() | weights, st.none() | inputs
)
patterns = st.sampled_from(["lm_head", "model.layers.0", "re:.*down_proj", "Linear", "Embedding"])
recipes = st.builds(
    Recipe.of,
    schemes,
    ignore=st.lists(patterns, max_size=3),
    include=st.lists(patterns, max_size=3),
    overrides=st.dictionaries(patterns, schemes, max_size=3),
    attention=st.sampled_from(["float", "int8"]),
)


# -- what is written is read back --------------------------------------------------------------------------------------


@given(recipes)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(schemes)
def test_a_scheme_survives_json(scheme: Scheme) -> None:
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_what_the_presets_stand_for() -> None:
    """SmoothQuant's table 2: the granularity of weights, of activations, and whether the latter is found on the fly."""
    table = {
        "w8a16": ("per_channel", None),
        "w8a8": ("per_channel", ("per_token", True)),
        "w8a8-static": ("per_channel", ("per_tensor", False)),
        "o1": ("per_tensor", ("per_token", True)),
        "o2": ("per_tensor", ("per_tensor", True)),
        "o3": ("per_tensor", ("per_tensor", False)),
    }
    for name, (weight, activation) in table.items():
        scheme = Scheme(name)
        assert scheme.weight.granularity == weight
        assert (scheme.input and (scheme.input.granularity, scheme.input.dynamic)) == activation
        assert str(scheme) == name
        assert scheme.is_static is (activation == ("per_tensor", False))
    assert set(table) == set(PRESETS)


def test_a_scheme_in_words() -> None:
    assert str(Scheme("w8a8", WeightArgs("per_tensor"))) == "w8a8 weight per_tensor"
    assert str(Scheme("w8a8", input=InputArgs("per_tensor"))) == "w8a8 input per_tensor dynamic"
    assert str(Scheme("w8a8-static").as_dynamic()) == "w8a8"
    assert str(Scheme("o3").as_dynamic()) == "w8a8 weight per_tensor"


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"recipe{suffix}"
    path.write_text(
        json.dumps({"scheme": "w8a16", "ignore": ["re:.*down_proj"]})
        if suffix == ".json"
        else "scheme: w8a16\nignore:\n  - 're:.*down_proj'\n",
        encoding="utf-8-sig",  # as some editors write it
    )
    assert Recipe.from_file(path) == Recipe.from_file(str(path)) == Recipe.of("w8a16", ignore=["re:.*down_proj"])


def test_a_scheme_without_a_name_is_w8a16() -> None:
    per_tensor = {"weight": {"granularity": "per_tensor"}}
    assert Scheme.from_dict(per_tensor) == Scheme("w8a16", WeightArgs("per_tensor"))


def test_a_whole_recipe_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
        scheme: {name: w8a16, weight: {granularity: per_group, group_size: 64}}
        targets: [Linear, Embedding]
        ignore: [lm_head]
        overrides:
          model.layers.0: w8a16
        """
    )
    recipe = Recipe.from_file(path)
    assert recipe.scheme == Scheme.of("w8a16", group_size=64)
    assert recipe.targets == ("Linear", "Embedding")
    assert recipe.overrides == (("model.layers.0", Scheme.of("w8a16")),)


# -- what is in a recipe ---------------------------------------------------------------------------------------------


def test_the_defaults() -> None:
    recipe = Recipe.of("w8a16")
    assert recipe == Recipe()
    assert recipe.scheme == Scheme("w8a16", WeightArgs("per_channel", None))
    assert recipe.targets == DEFAULT_TARGETS
    assert not set(OPT_IN_TARGETS) & set(DEFAULT_TARGETS)


def test_of_adds_to_a_recipe() -> None:
    base = Recipe.of("w8a16", ignore=["a"], include=["Embedding"], overrides={"b": Scheme.of("w8a16", group_size=32)})
    more = Recipe.of(base, ignore=["c"], include=["OutputHead"], overrides={"d": Scheme()})
    assert more.ignore == ("a", "c")
    assert more.targets == (*DEFAULT_TARGETS, "Embedding", "OutputHead")
    assert [pattern for pattern, _ in more.overrides] == ["d", "b"], "the first that matches counts: what was added"
    again = Recipe.of(base, overrides={"b": Scheme()})
    assert again.overrides == (("b", Scheme()),) and Recipe.from_dict(again.to_dict()) == again
    assert more.schemes == (Scheme(), Scheme(), Scheme.of("w8a16", group_size=32))
    assert base.ignore == ("a",), "a recipe is not changed by what is made of it"
    int8 = Recipe.of(base, attention="int8")
    assert int8.attention == Recipe.of(int8).attention == "int8" and Recipe.of(int8, attention="float") == base


def test_of_takes_a_scheme() -> None:
    scheme = Scheme.of("w8a16", group_size=128)
    assert Recipe.of(scheme).scheme is scheme
    assert Recipe.of("w8a16", group_size=128).scheme == scheme
    assert str(scheme) == "w8a16 g128"
    assert str(Scheme()) == "w8a16"


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        Recipe().ignore = ("a",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.1", "model.layers.1", True),
        ("model.layers.1", "model.layers.1.mlp.up", True),
        ("model.layers.1", "model.layers.10", False),
        ("model.layers.1", "encoder.model.layers.1", False),
        ("mlp", "model.mlp", False),
        ("re:.*down_proj", "model.layers.0.mlp.down_proj", True),
        ("re:down_proj", "model.layers.0.mlp.down_proj", False),  # matched from the start, as vLLM matches
        ("re:model", "model.layers.0.mlp.down_proj", True),  # but not to the end
        (r"re:model\.layers\.[01]\.", "model.layers.1.mlp", True),
        (r"re:model\.layers\.[01]\.", "model.layers.12.mlp", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert pattern_matches(pattern, name) is expected


def test_a_predicate_sees_name_and_module() -> None:
    module = object()
    assert pattern_matches(lambda name, other: name == "a" and other is module, "a", module)
    assert not pattern_matches(lambda name, other: name == "a", "b", module)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": "w8a16"}, "recipe: unknown key 'schema'; valid: scheme, targets, ignore, overrides"),
        ({"scheme": "w4a16"}, f"unknown scheme 'w4a16'; valid: {', '.join(PRESETS)}"),
        ({"scheme": {"name": ["w8a16"]}}, r"unknown scheme \['w8a16'\]; valid: w8a16"),
        ({"scheme": {"nam": "w8a16"}}, "scheme: unknown key 'nam'; valid: name, weight"),
        (
            {"scheme": {"weight": {"groups": 1}}},
            "scheme.weight: unknown key 'groups'; valid: granularity, group_size",
        ),
        ({"scheme": {"weight": {"granularity": "per_token"}}}, "weight.granularity is 'per_token', expected"),
        ({"scheme": {"name": "w8a8", "input": {"granularity": "per_channel"}}}, "input.granularity is 'per_channel'"),
        ({"scheme": {"name": "w8a8", "input": {"dynamic": False}}}, "a static scale is 'per_tensor'"),
        ({"scheme": {"name": "w8a8", "input": {"dynamic": "false"}}}, "input.dynamic is 'false', expected true"),
        ({"scheme": {"name": "w8a16", "input": {}}}, "scheme 'w8a16' has float inputs, got input="),
        (
            {"scheme": {"name": "w8a8", "weight": {"granularity": "per_group", "group_size": 64}}},
            r"scheme 'w8a8' has int8 inputs with weights per_group \(group_size=64\); expected weights per_channel",
        ),
        ({"attention": "int4"}, "attention is 'int4', expected one of 'float', 'int8'"),
        ({"scheme": {"weight": {"granularity": "per_group"}}}, "per_group needs a group_size"),
        ({"scheme": {"weight": {"group_size": 64}}}, "weight.group_size is 64 with granularity 'per_channel'"),
        (
            {"scheme": {"weight": {"granularity": "per_group", "group_size": "64"}}},
            "weight.group_size is '64', expected a positive whole number",
        ),
        ({"scheme": 8}, "scheme is 8, expected a mapping"),
        ({"ignore": "lm_head"}, r"ignore is 'lm_head', expected a list of patterns; write \['lm_head'\]"),
        ({"ignore": 3}, "ignore is 3, expected a list"),
        ({"ignore": [""]}, "ignore holds '', expected a module's name"),
        ({"targets": [None]}, "targets holds None"),
        ({"ignore": ["re:("]}, r"ignore: 're:\(' is not a regular expression"),
        ({"ignore": ["re:a{99999999999}"]}, r"ignore: 're:a.*' is not a regular expression: the repetition number"),
        ({"overrides": ["a"]}, r"recipe.overrides is \['a'\], expected a mapping"),
        ({"overrides": {"a": "w2"}}, "unknown scheme 'w2'"),
        (["w8a16"], r"recipe is \['w8a16'\], expected a mapping"),
    ],
)
def test_from_dict_refuses(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


@pytest.mark.parametrize("field", ["ignore", "include"])
def test_of_refuses_one_string(field: str) -> None:
    """It would be read as a list of letters."""
    with pytest.raises(RecipeError, match=rf"{field} is 'lm_head', expected a list of patterns; write \['lm_head'\]"):
        Recipe.of("w8a16", **{field: "lm_head"})  # type: ignore[arg-type]


def test_of_refuses_a_group_size_beside_a_scheme() -> None:
    with pytest.raises(RecipeError, match="group_size=64 goes with a preset's name"):
        Recipe.of(Scheme(), group_size=64)


@pytest.mark.parametrize("group_size", [0, -1, 1.5, True])
def test_group_sizes_are_positive(group_size: Any) -> None:
    with pytest.raises(RecipeError, match="expected a positive whole number"):
        Scheme.of("w8a16", group_size=group_size)


def test_recipe_refuses_what_is_no_scheme() -> None:
    with pytest.raises(RecipeError, match=r"scheme is 'w8a16', expected a Scheme; Recipe.of\('w8a16'\)"):
        Recipe("w8a16")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"overrides\['a'\] is 'w8a16', expected a Scheme"):
        Recipe(overrides={"a": "w8a16"})  # type: ignore[arg-type]


WRONG: list[Any] = [5, True, [5], ["ab"], [("a",)], "ab"]


@pytest.mark.parametrize("make", [Recipe, partial(Recipe.of, "w8a16")], ids=["Recipe", "of"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_overrides_that_are_no_pairs_are_named(make: Any, value: Any) -> None:
    with pytest.raises(RecipeError, match=r"^overrides is .*, expected a mapping of pattern to Scheme$"):
        make(overrides=value)


@pytest.mark.parametrize("field", ["ignore", "include", "targets"])
def test_patterns_that_are_no_list_are_named(field: str) -> None:
    make: Any = Recipe if field == "targets" else partial(Recipe.of, "w8a16")
    for value, fix in ((5, r"\[\] for none"), (len, r"\[<built-in function len>\]")):
        with pytest.raises(RecipeError, match=rf"^{field} is .*, expected a list of patterns; write {fix}$"):
            make(**{field: value})


def test_a_pattern_of_overrides_is_a_pattern() -> None:
    with pytest.raises(RecipeError, match=r"^overrides holds \[\], expected a module's name"):
        Recipe(overrides=[([], Scheme())])  # type: ignore[arg-type, list-item]


def test_a_schemes_parts_are_of_their_types() -> None:
    with pytest.raises(RecipeError, match=r"^weight is 5, expected WeightArgs\(...\), or None"):
        Scheme(weight=5)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"^input is False, expected InputArgs\(...\), or None"):
        Scheme("w8a8", input=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["targets", "ignore", "overrides"])
def test_a_predicate_does_not_fit_in_a_file(field: str) -> None:
    def deep(name: str, module: Any) -> bool:
        return name.count(".") > 3

    value: Any = {deep: Scheme()} if field == "overrides" else [deep]
    with pytest.raises(RecipeError, match=f"{field} holds the predicate .*deep.*, which a file cannot"):
        Recipe(**{field: value}).to_dict()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json: not valid JSON"),
        ("a.yaml", "a: [", "a.yaml: not valid YAML"),
        ("a.yaml", "scheme: 2026-13-45", "a.yaml: not valid YAML: month must be in 1..12"),
        ("a.yaml", "[a]: b", "a.yaml: not valid YAML"),
        ("a.toml", "", "a.toml: a recipe ends in .json, .yaml or .yml, got '.toml'"),
        ("a.yaml", "ignored: [x]", "a.yaml: recipe: unknown key 'ignored'"),
        ("a.yaml", "", "a.yaml: recipe is None, expected a mapping"),
        ("a.json", '{"ignore": ["a"], "ignore": ["b"]}', "a.json: not valid JSON: the key 'ignore' is there twice"),
        ("a.json", '{"overrides": {"a": "w8a8", "a": "w8a16"}}', "a.json: not valid JSON: the key 'a' is there twice"),
        ("a.yaml", "ignore: [a]\nignore: [b]", "a.yaml: not valid YAML: the key 'ignore' is there twice"),
        ("a.yaml", "overrides:\n  a: w8a8\n  a: w8a16", "a.yaml: not valid YAML: the key 'a' is there twice"),
        ("a.json", '{"scheme": "w9"}', "a.json: unknown scheme 'w9'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.json: cannot read the recipe: .*No such file"):
        Recipe.from_file(tmp_path / "none.json")


def test_binary_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.from_file(path)


def test_torch_is_not_loaded() -> None:
    code = "import sys, octavo.recipe; assert not {'torch', 'yaml', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
