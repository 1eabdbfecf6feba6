"""Recipes by name and by path, and those that ship with dfq."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.errors import RecipeError
from dfq.quantization.layers import IntegerLinear
from dfq.recipe import Recipe, load_recipe
from dfq.recipe_files import shipped_recipes, summary

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*.toml"))
NAMES = [path.stem for path in FILES]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names do not depend on the working directory."""
    monkeypatch.chdir(tmp_path)


def test_the_recipes_of_the_repository_ship() -> None:
    assert set(shipped_recipes()) == set(NAMES)
    assert {"w8a8", "w4a8", "w6a6", "w4a8-mixed", "quick"} <= set(NAMES)


def test_a_wheel_takes_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["dfq"]
    taken = {path.resolve() for pattern in patterns for path in (ROOT / "dfq").glob(pattern)}
    assert set(FILES) <= taken


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe == load_recipe(ROOT / "recipes" / f"{name}.toml")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_what_it_is(name: str) -> None:
    said = summary(shipped_recipes()[name])
    assert len(said) > 10
    assert not said.endswith(".")


@pytest.mark.parametrize("given", ["./w4a8", "w4a8.toml", "./w4a8.toml", Path("w4a8")], ids=repr)
def test_a_path_is_a_file_of_the_users(given: str | Path) -> None:
    Path(given).write_text("[quantization]\nbits = 3\n")
    assert load_recipe(given).quantization.bits == 3
    assert load_recipe("w4a8").quantization.bits == 4


def test_an_unknown_name_is_told_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("w4a7")
    message = str(caught.value)
    assert "'w4a7'" in message
    assert all(name in message for name in NAMES)
    assert "'w4a8'" in message.partition("Did you mean")[2]


@pytest.mark.parametrize("given", ["w6a6.toml", "recipes/w6a6.toml", Path("w6a6")], ids=repr)
def test_a_missing_file_of_a_known_name_is_told_the_name(given: str | Path) -> None:
    with pytest.raises(RecipeError, match=r"does not exist\..*'w6a6'"):
        load_recipe(given)


def test_the_command_lists_them() -> None:
    ended = CliRunner().invoke(app, ["recipes", "--json"])
    entries = json.loads(ended.stdout)
    assert [entry["name"] for entry in entries] == sorted(NAMES)
    assert all(Path(entry["path"]).is_file() and entry["summary"] for entry in entries)
    shown = CliRunner().invoke(app, ["recipes"]).stdout
    assert [line.split()[0] for line in shown.splitlines()] == sorted(NAMES)


def layer_bits(path: Path) -> dict[str, tuple[int, int]]:
    """Bits of the weights and of the input of each linear layer of a checkpoint."""
    layers = dfq.load(path).named_modules()
    return {
        name: (layer.scheme.bits, layer.scheme.input.bits)
        for name, layer in layers
        if isinstance(layer, IntegerLinear)
    }


@pytest.mark.parametrize(
    ("name", "inner", "fc2"), [("w6a6", (6, 6), (6, 6)), ("w4a8-mixed", (4, 8), (8, 8))]
)
def test_a_scheme_is_a_recipe(
    tmp_path: Path, name: str, inner: tuple[int, int], fc2: tuple[int, int]
) -> None:
    result = dfq.quantize("demo", recipe=name, images=4, iterations=4, threads=1, cache=tmp_path)
    assert Path(result.checkpoint).name == f"demo-{name}"
    bits = layer_bits(Path(result.checkpoint))
    assert bits.pop("patch_embed") == bits.pop("head") == (8, 8)
    assert len(bits) >= 8
    for layer, bit_width in bits.items():
        assert bit_width == (fc2 if layer.endswith("mlp.fc2") else inner)
    again = load_recipe(Path(result.checkpoint) / "recipe.toml").quantization
    assert (again.layers, again.bits) == (load_recipe(name).quantization.layers, inner[0])
    assert result.agreement is not None
    assert result.agreement > 0.5
