"""Inversion into datasets: classes, precision, resuming, cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq import device
from dfq.data.dataset import SparseImageDataset
from dfq.data.settings import MANIFEST, SETTINGS
from dfq.errors import DatasetError, SettingError
from dfq.files import write_json
from dfq.inversion.schedules import METHODS
from dfq.pipeline.synthesis import make_dataset
from dfq.progress import Silent
from dfq.recipe import InversionSettings
from dfq.vit.load import LoadedModel, load_model


def made(loaded: LoadedModel, cache: Path, **changes: Any) -> tuple[SparseImageDataset, bool]:
    base: dict[str, Any] = {"iterations": 4, "images": 8, "precision": "float32", "threads": 1}
    settings = InversionSettings(**{**base, **changes})
    cpu = torch.device("cpu")
    return make_dataset(loaded, settings, out=None, device=cpu, cache=cache, progress=Silent())


def test_all_classes_are_no_part_of_the_settings(loaded: LoadedModel, tmp_path: Path) -> None:
    dataset, _ = made(loaded, tmp_path)
    assert "classes" not in dataset.settings["inversion"]


def test_what_ranked_the_patches_is_recorded_and_keeps_datasets_apart(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = made(loaded, tmp_path, importance="random")
    other, _ = made(loaded, tmp_path, importance="attention")
    assert asked.path != other.path
    monkeypatch.setattr(METHODS["pri"], "ranking", lambda *_: "random")
    for importance in ("random", "attention", "auto"):
        dataset, found = made(loaded, tmp_path, importance=importance)
        assert found
        assert dataset.path == asked.path
        assert dataset.settings["inversion"]["importance"] == "random"
    with monkeypatch.context() as patched:
        patched.setattr(METHODS["pri"], "ranks", False)
        with pytest.raises(SettingError, match="does not rank patches"):
            made(loaded, tmp_path)


def test_chosen_classes_are_recorded_and_kept_apart(loaded: LoadedModel, tmp_path: Path) -> None:
    all_classes, _ = made(loaded, tmp_path)
    some, reused = made(loaded, tmp_path, classes=(3,))
    assert not reused
    assert some.path != all_classes.path
    assert some.settings["inversion"]["classes"] == [3]
    assert {int(c) for batch in some.batches(8) for c in batch.labels} == {3}
    again, reused = made(loaded, tmp_path, classes=(3,))
    assert reused
    assert again.path == some.path


@pytest.mark.skipif(
    not device.int8_is_exact(torch.device("cpu"), 63), reason="int7 is not exact here"
)
def test_seven_bit_integers_are_recorded_and_resumed(loaded: LoadedModel, tmp_path: Path) -> None:
    floats, _ = made(loaded, tmp_path)
    whole, _ = made(loaded, tmp_path, precision="int7", unit_size=1)
    assert whole.settings["inversion"]["precision"] == "int7"
    assert whole.path.name != floats.path.name
    shards = {p: p.read_bytes() for p in whole.path.glob("*.safetensors")}
    assert len(shards) > 1
    (whole.path / MANIFEST).unlink()
    for path in [*shards][1:]:
        path.unlink()
    again, found = made(loaded, tmp_path, precision="int7", unit_size=1)
    assert (again.path, found) == (whole.path, False)
    assert {p: p.read_bytes() for p in again.path.glob("*.safetensors")} == shards


@pytest.mark.parametrize("method", ["pri", "smi", "dmi", "noise"])
def test_an_unknown_class_is_refused_before_anything_is_written(
    loaded: LoadedModel, tmp_path: Path, method: str
) -> None:
    with pytest.raises(SettingError, match="classes has 5; the model's classes are 0 to 4"):
        made(loaded, tmp_path, method=method, classes=(1, 5))
    assert not list(tmp_path.iterdir())


def test_classes_of_a_model_without_a_classifier_are_refused(tmp_path: Path) -> None:
    bare = load_model(make_vit(num_classes=0))
    with pytest.raises(SettingError, match="no classifier; leave classes empty"):
        made(bare, tmp_path, classes=(0,))


def test_classes_are_chosen_by_a_recipe(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=32, num_classes=5)
    (tmp_path / "one.toml").write_text("[inversion]\nclasses = [2]\niterations = 4\nimages = 4\n")
    result = dfq.invert(model, recipe=tmp_path / "one.toml", out=tmp_path / "images")
    labels = [b.labels for b in SparseImageDataset(Path(result.path)).batches(4)]
    assert torch.cat(labels).unique().tolist() == [2]


def test_an_unfinished_run_of_another_machine_is_left_alone_until_it_is_old(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    whole, _ = made(loaded, tmp_path)
    shards = {p.name: p.read_bytes() for p in whole.path.glob("*.safetensors")}
    (whole.path / MANIFEST).unlink()
    write_json(whole.path / SETTINGS, {**whole.settings, "machine": "another"})
    with pytest.raises(DatasetError, match=f"`dfq cache remove {whole.path.name}`"):
        made(loaded, tmp_path)
    assert {p.name for p in whole.path.iterdir()} == {*shards, SETTINGS}
    for path in (*whole.path.iterdir(), whole.path):
        os.utime(path, (0, 0))
    again, reused = made(loaded, tmp_path)
    assert not reused
    assert again.settings == whole.settings
    assert {p.name: p.read_bytes() for p in again.path.glob("*.safetensors")} == shards


def test_a_checkpoint_records_how_its_dataset_was_made(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    args: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    chosen: dict[str, Any] = {"iterations": 6, "stages": 3, "images": 6, "seed": 5, "threads": 1}
    dataset = dfq.invert(tiny, out=tmp_path / "images", **chosen, **args)
    result = dfq.quantize(tiny, calibration=dataset.path, out=tmp_path / "w8", **args)
    recipe = dfq.load_recipe(Path(result.checkpoint) / "recipe.toml")
    assert {name: getattr(recipe.inversion, name) for name in chosen} == chosen
    again = dfq.quantize(tiny, recipe=recipe, out=tmp_path / "again", **args)
    first, second = (Path(r.checkpoint) / "model.safetensors" for r in (result, again))
    assert first.read_bytes() == second.read_bytes()
