"""Settings, their bounds, and recipes in TOML."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import RecipeError, SettingError, UsageError
from dfq.recipe import (
    LAYERS,
    SECTIONS,
    DistillationSettings,
    InversionSettings,
    LayerSettings,
    QuantizationSettings,
    Recipe,
    load_recipe,
    override,
    recipe_from_dict,
    to_dict,
    to_toml,
)
from dfq.validation import describe

QUICK = settings(deadline=None, max_examples=100, derandomize=True)

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))

ALL_FIELDS = [
    (section, name)
    for section, kind in SECTIONS.items()
    for name in describe(kind)
    if name != LAYERS
]


def spec(section: str, name: str) -> tuple[Any, Any, Any]:
    """A field's type and its bounds."""
    info = describe(SECTIONS[section])[name]
    return (info.kind | None if info.optional else info.kind), info.low, info.high


def is_tuple(section: str, name: str) -> bool:
    return spec(section, name)[0] in (tuple[float, ...], tuple[int, ...])


def whole(section: str, name: str) -> bool:
    return spec(section, name)[0] in (int, int | None, tuple[int, ...])


BOUNDED = [f for f in ALL_FIELDS if spec(*f)[1] is not None]
WHOLE = [f for f in BOUNDED if whole(*f)]
FRACTIONAL = [f for f in BOUNDED if not whole(*f)]
CHOICES = [f for f in ALL_FIELDS if f not in BOUNDED and spec(*f)[0] is not bool]
SWITCHES = [f for f in ALL_FIELDS if spec(*f)[0] is bool]


def build(section: str, name: str, value: Any) -> Any:
    """Settings with one field changed; the value itself, or in a tuple where there is one."""
    return SECTIONS[section](**{name: (value,) if is_tuple(section, name) else value})


def read(section: str, name: str, value: Any) -> Any:
    built = getattr(build(section, name, value), name)
    return built[0] if is_tuple(section, name) else built


def refused(section: str, name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"^{name} is .*allowed: "):
        build(section, name, value)


# bounds and types


def test_fields_of_all_kinds_are_covered() -> None:
    assert len(WHOLE) + len(FRACTIONAL) + len(CHOICES) + len(SWITCHES) == len(ALL_FIELDS)
    assert min(len(WHOLE), len(FRACTIONAL), len(CHOICES), len(SWITCHES)) > 0


@pytest.mark.parametrize(("section", "name"), BOUNDED)
def test_bounds_are_inclusive(section: str, name: str) -> None:
    for bound in spec(section, name)[1:]:
        assert read(section, name, bound) == bound


@pytest.mark.parametrize(("section", "name"), WHOLE)
def test_whole_number_just_out_of_bounds_is_refused(section: str, name: str) -> None:
    _, low, high = spec(section, name)
    refused(section, name, int(low) - 1)
    refused(section, name, int(high) + 1)


@pytest.mark.parametrize(("section", "name"), FRACTIONAL)
def test_number_just_out_of_bounds_is_refused(section: str, name: str) -> None:
    _, low, high = spec(section, name)
    refused(section, name, math.nextafter(low, -math.inf))
    refused(section, name, math.nextafter(high, math.inf))


@pytest.mark.parametrize(("section", "name"), BOUNDED)
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 10**400, -(10**400)],
    ids=["nan", "inf", "-inf", "huge", "-huge"],
)
def test_number_without_a_place_is_refused(section: str, name: str, value: float) -> None:
    refused(section, name, value)


@pytest.mark.parametrize(("section", "name"), BOUNDED)
@pytest.mark.parametrize("value", [True, False, "1", [1], {}, 1j])
def test_value_that_is_no_number_is_refused(section: str, name: str, value: Any) -> None:
    refused(section, name, value)


@pytest.mark.parametrize(("section", "name"), WHOLE)
def test_fraction_is_no_whole_number(section: str, name: str) -> None:
    refused(section, name, 2.0)


@pytest.mark.parametrize(("section", "name"), SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_number_or_text_is_no_switch(section: str, name: str, value: Any) -> None:
    refused(section, name, value)


@pytest.mark.parametrize(("section", "name"), CHOICES)
def test_every_choice_is_accepted(section: str, name: str) -> None:
    for choice in get_args(spec(section, name)[0]):
        assert read(section, name, choice) == choice


@pytest.mark.parametrize(("section", "name"), CHOICES)
@pytest.mark.parametrize("value", ["", "other", 0, 16, True, None, ["pri"], 4.5])
def test_unknown_choice_is_refused_with_all_that_are_known(
    section: str, name: str, value: Any
) -> None:
    known = ", ".join(map(str, get_args(spec(section, name)[0])))
    with pytest.raises(SettingError, match=re.escape(f"allowed: {known}")):
        build(section, name, value)


@pytest.mark.parametrize("bits", [4.0, 8.0])
def test_bits_are_a_whole_number(bits: float) -> None:
    refused("quantization", "bits", bits)


@pytest.mark.parametrize(
    ("section", "name", "value", "meant"),
    [
        ("inversion", "method", "pir", "pri"),
        ("inversion", "precision", "float23", "float32"),
        ("quantization", "attention", "flaot", "float"),
        ("quantization", "observer", "histgram", "histogram"),
        ("quantization", "rounding", "gtpq", "gptq"),
    ],
)
def test_misspelt_choice_names_the_nearest(section: str, name: str, value: str, meant: str) -> None:
    with pytest.raises(SettingError, match=rf"Did you mean '{meant}'"):
        build(section, name, value)


def test_message_with_a_suggestion_ends_with_one_mark() -> None:
    with pytest.raises(SettingError, match=r"Did you mean 'pri'\?$"):
        build("inversion", "method", "pir")


def test_only_threads_may_be_left_out() -> None:
    assert InversionSettings(threads=None).threads is None
    refused("inversion", "images", None)


def test_list_of_shares_may_be_empty() -> None:
    assert InversionSettings(prune_at=()).prune_at == ()


def test_single_share_is_no_list() -> None:
    with pytest.raises(SettingError, match="prune_at"):
        InversionSettings(prune_at=0.1)  # type: ignore[arg-type]


def test_every_share_of_a_list_is_checked() -> None:
    with pytest.raises(SettingError, match="prune_at"):
        InversionSettings(prune_at=(0.1, 1.1))


def test_a_class_that_is_named_twice_is_refused() -> None:
    assert InversionSettings(classes=(3, 0)).classes == (3, 0)
    with pytest.raises(SettingError, match=r"classes is \(3, 0, 3\); allowed: each class once"):
        InversionSettings(classes=(3, 0, 3))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        InversionSettings().images = 5  # type: ignore[misc]


def test_replacing_a_field_checks_it() -> None:
    with pytest.raises(SettingError, match="lr"):
        dataclasses.replace(InversionSettings(), lr=-1.0)


# round trips


def values_of(section: str, name: str) -> st.SearchStrategy[Any]:
    hint, low, high = spec(section, name)
    if hint is bool:
        return st.booleans()
    if low is None:
        return st.sampled_from(get_args(hint))
    if whole(section, name):
        numbers = st.integers(int(low), int(high))
        if is_tuple(section, name):
            return st.lists(numbers, max_size=5, unique=True).map(tuple)
        return numbers if hint is int else st.none() | numbers
    shares = st.floats(low, high) | st.integers(math.ceil(low), int(high))
    return st.lists(shares, max_size=5).map(tuple) if is_tuple(section, name) else shares


def settings_of(section: str) -> st.SearchStrategy[Any]:
    fields = [name for s, name in ALL_FIELDS if s == section]
    strategies = {name: values_of(section, name) for name in fields}
    if section == "quantization":
        strategies[LAYERS] = st.dictionaries(st.text(max_size=12), exceptions, max_size=3)
    return st.builds(SECTIONS[section], **strategies)


exceptions = st.builds(
    LayerSettings,
    bits=st.none() | st.integers(2, 8),
    input_bits=st.none() | st.integers(4, 8),
    group=st.none() | st.integers(0, 1 << 20),
    rounding=st.sampled_from([None, "nearest", "gptq"]),
    observer=st.sampled_from([None, "mse", "minmax"]),
)


recipes = st.builds(
    Recipe, inversion=settings_of("inversion"), quantization=settings_of("quantization")
)


@QUICK
@given(recipes)
def test_recipe_survives_toml(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "recipe.toml"
        path.write_text(to_toml(recipe), encoding="utf-8")
        loaded = load_recipe(path)
    assert loaded == recipe
    assert list(loaded.quantization.layers) == list(recipe.quantization.layers)


@QUICK
@given(recipes)
def test_recipe_survives_json(recipe: Recipe) -> None:
    """Whatever order the keys of its objects take: that of the exceptions counts."""
    loaded = recipe_from_dict(json.loads(json.dumps(to_dict(recipe), sort_keys=True)))
    assert loaded == recipe
    assert list(loaded.quantization.layers) == list(recipe.quantization.layers)


def test_toml_explains_every_field() -> None:
    chosen = QuantizationSettings(activations="symmetric")  # unwritten where it is the default
    whole = to_toml(Recipe(quantization=chosen, distillation=DistillationSettings()))
    tables = dict(zip(SECTIONS, whole.split("\n\n"), strict=True))
    for section, kind in SECTIONS.items():
        head, *lines = tables[section].splitlines()
        assert head == f"[{section}]"
        for name, info in describe(kind).items():
            if name == LAYERS:
                continue
            (line,) = (x for x in lines if re.match(rf"(# )?{name} =", x))
            assert line.endswith(f"  # {info.description}")


@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
def test_a_setting_that_came_later_is_written_where_it_is_not_the_default(
    tmp_path: Path, activations: Any
) -> None:
    """So recipes and checkpoints without it keep their bytes."""
    recipe = Recipe(quantization=QuantizationSettings(activations=activations))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    written = activations == "symmetric"
    assert ("activations" in (tmp_path / "recipe.toml").read_text()) == written
    assert ("activations" in to_dict(recipe)["quantization"]) == written
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert recipe_from_dict(to_dict(recipe)) == recipe


def test_fields_that_are_left_out_keep_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[inversion]\nimages = 7\n")
    expected = Recipe(InversionSettings(images=7), QuantizationSettings())
    assert load_recipe(tmp_path / "recipe.toml") == expected


def test_empty_recipe_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    assert load_recipe(str(tmp_path / "recipe.toml")) == Recipe()


def test_override_changes_what_is_given_only() -> None:
    before = Recipe(InversionSettings(images=7, seed=3), QuantizationSettings(bits=4))
    after = override(before, "inversion", images=9, seed=None)
    assert after == Recipe(InversionSettings(images=9, seed=3), QuantizationSettings(bits=4))


def test_override_checks_bounds() -> None:
    with pytest.raises(SettingError, match="images"):
        override(Recipe(), "inversion", images=0)


# recipe files


def load_text(place: Path, text: str | bytes) -> Recipe:
    path = place / "recipe.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path)


@pytest.mark.parametrize(("section", "name"), ALL_FIELDS)
def test_misspelt_key_names_the_nearest(tmp_path: Path, section: str, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key '{name}s' in \[{section}\].*'{name}'"):
        load_text(tmp_path, f"[{section}]\n{name}s = 1\n")


@pytest.mark.parametrize(("section", "name"), ALL_FIELDS)
def test_key_outside_its_table_is_told_where_it_belongs(
    tmp_path: Path, section: str, name: str
) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key '{name}'.*under.*\[{section}\]"):
        load_text(tmp_path, f"{name} = 1\n")


def test_misspelt_table_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'inversion'"):
        load_text(tmp_path, "[invertion]\nimages = 3\n")


@pytest.mark.parametrize("text", ["inversion = 3", "[[inversion]]\nimages = 3"])
def test_section_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"\[inversion\] must be a table"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_content_that_is_no_table_is_refused(content: Any) -> None:
    with pytest.raises(RecipeError, match="expected tables"):
        recipe_from_dict(content)


def test_bad_value_is_told_with_its_file_and_table(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"recipe\.toml', \[inversion\]: images is 0"):
        load_text(tmp_path, "[inversion]\nimages = 0\n")


@pytest.mark.parametrize(
    "line",
    [
        "images = true",
        "images = 2.0",
        "images = '2'",
        "lr = nan",
        "lr = inf",
        "lr = 2020-01-01",
        "flip = 1",
        "method = ['pri']",
        "prune_at = [[0.1]]",
        "prune_at = [true]",
        "prune_at = 0.1",
    ],
)
def test_value_of_the_wrong_type_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingError, match=line.split()[0]):
        load_text(tmp_path, f"[inversion]\n{line}\n")


@pytest.mark.parametrize(
    "text",
    [
        "[inversion",
        "images",
        "[inversion]\nimages = 3\nimages = 4\n",
        b"\xff\xfe[inversion]",
        b"\xef\xbb\xbf[inversion]\n",
        b"\x00",
        "[inversion]\nprune_at = " + "[" * 100_000,
        "[inversion]\nimages = " + "9" * 5000,
    ],
    ids=["open", "no-value", "twice", "not-utf8", "bom", "null", "deep", "long-number"],
)
def test_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        load_text(tmp_path, text)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.toml' does not exist"):
        load_recipe(tmp_path / "missing.toml")


def test_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


# the recipes in the repository


def test_recipes_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipe_loads(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


# exceptions by layer


def test_exceptions_by_layer_are_tables(tmp_path: Path) -> None:
    text = '[quantization]\nbits = 4\n[layers."blocks.*.mlp.fc2"]\nbits = 8\ninput_bits = 6\n'
    recipe = load_text(tmp_path, text)
    assert recipe.quantization.layers == {"blocks.*.mlp.fc2": LayerSettings(bits=8, input_bits=6)}
    assert recipe.quantization.bits == 4
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("table", "facts"),
    [
        ('[layers."head"]\nbits = 9', ("head", "bits", "9", "2 to 8")),
        ('[layers."head"]\nbit = 4', ("head", "bit", "input_bits")),
        ("[layers]\nhead = 4", ("head", "4")),
        ("layers = 4", ("layers", "4")),
    ],
)
def test_wrong_exceptions_are_named(tmp_path: Path, table: str, facts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, table)
    assert all(fact in str(caught.value) for fact in facts)


@pytest.mark.parametrize(
    "entries",
    [
        [{"bits": 4}],
        [{"pattern": 4}],
        ["head"],
        [{"pattern": "head"}, {"pattern": "head", "bits": 4}],
    ],
)
def test_wrong_exceptions_of_json_are_named(entries: list[Any]) -> None:
    with pytest.raises(SettingError, match=r"layers.*pattern"):
        recipe_from_dict({"quantization": {"layers": entries}})
