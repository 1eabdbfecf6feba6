"""``invert`` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_calls import FAST, quantize
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.errors import SettingError


def test_inversion_returns_what_it_wrote(tmp_path: Path, tiny: VisionTransformer) -> None:
    result = dfq.invert(tiny, images=4, settings=FAST, out=tmp_path / "images")
    dataset = dfq.SparseImageDataset(tmp_path / "images")
    assert result.path == str(tmp_path / "images")
    assert (result.images, result.bytes) == (len(dataset), dataset.bytes)
    assert (result.method, result.cached) == ("pri", False)


def test_the_second_inversion_comes_from_the_cache(tiny: VisionTransformer) -> None:
    first = dfq.invert(tiny, images=4, settings=FAST)
    second = dfq.invert(tiny, images=4, settings=FAST)
    assert (first.cached, second.cached) == (False, True)
    assert first.path == second.path


def of_patches(count: int) -> VisionTransformer:
    return make_vit(img_size=(4, 4 * count))


@pytest.mark.parametrize("patches", [1, 2, 3])
def test_fewer_patches_than_stages_lower_their_default(patches: int, tmp_path: Path) -> None:
    model = of_patches(patches)
    settings = {"iterations": 6, "threads": 1}
    dfq.invert(model, images=5, settings=settings, out=tmp_path / "images")
    dataset = dfq.SparseImageDataset(tmp_path / "images")
    assert [len(dataset), dataset.settings["inversion"]["stages"]] == [5, patches]
    assert {shard.patches for shard in dataset.shards} == {1}
    result = quantize(model, tmp_path / "out", settings={"inversion": settings})
    assert result.agreement is not None
    recipe = dfq.load_recipe(tmp_path / "out" / "recipe.toml")
    assert recipe.inversion.stages == patches


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fewer_iterations_than_stages_lower_their_default(
    iterations: int, tmp_path: Path, tiny: VisionTransformer
) -> None:
    dfq.invert(tiny, images=5, iterations=iterations, threads=1, out=tmp_path / "images")
    dataset = dfq.SparseImageDataset(tmp_path / "images")
    assert dataset.settings["inversion"]["stages"] == iterations


@pytest.mark.parametrize("how", ["argument", "settings", "recipe", "file"])
def test_stages_that_were_asked_for_are_not_lowered(how: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[inversion]\nstages = 3\n")
    ways: dict[str, dict[str, Any]] = {
        "argument": {"stages": 3},
        "settings": {"settings": {"stages": 3}},
        "recipe": {"recipe": dfq.Recipe(dfq.InversionSettings(stages=3))},
        "file": {"recipe": tmp_path / "r.toml"},
    }
    asked = ways[how]
    message = r"There are 3 stages, but only 2 patches; give at most stages=2"
    with pytest.raises(SettingError, match=message):
        dfq.invert(of_patches(2), images=4, threads=1, out=tmp_path / "images", **asked)
    if how == "settings":
        asked = {"settings": {"inversion": {"stages": 3}}}
    with pytest.raises(SettingError, match=message):
        dfq.quantize(of_patches(2), images=4, threads=1, out=tmp_path / "out", **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]
