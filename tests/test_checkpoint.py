"""Checkpoints: nothing is lost on the way to disk and back."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from saved_checkpoints import (
    INVERSION,
    SOURCE,
    VARIANTS,
    change_config,
    quantized,
    save,
    some_images,
)
from torch import Tensor
from trees import tree

from dfq.checkpoint import load, read_info, write_report
from dfq.quantization import QuantizedViT
from dfq.recipe import QuantizationSettings, Recipe, load_recipe
from dfq.vit.load import LoadedModel, load_model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("attention", ["float", "int8"])
def test_loaded_model_gives_the_same_logits(
    tmp_path: Path, loaded: LoadedModel, bits: Any, attention: Any
) -> None:
    model = quantized(loaded, QuantizationSettings(bits=bits, attention=attention))
    save(tmp_path / "out", model)
    images = some_images(model)
    assert torch.equal(load(tmp_path / "out")(images), model(images))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_survives_the_disk(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = quantized(load_model(make_vit(**changes)), QuantizationSettings(bits=4))
    save(tmp_path / "out", model)
    images = some_images(model)
    assert torch.equal(load(tmp_path / "out")(images), model(images))


def test_state_survives_the_disk(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    ours, theirs = load(w4a8).state_dict(), w4a8_model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_loaded_model_knows_how_it_was_made(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    loaded = load(str(w4a8))
    assert loaded.arch == w4a8_model.arch
    assert loaded.preprocessing == w4a8_model.preprocessing
    assert loaded.settings == w4a8_model.settings


def test_loaded_model_is_for_inference(w4a8: Path) -> None:
    loaded = load(w4a8)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_info_is_what_was_saved(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    info = read_info(str(w4a8))
    assert (info.model, info.source) == ("my vit", SOURCE)
    assert (info.arch, info.preprocessing) == (w4a8_model.arch, w4a8_model.preprocessing)
    assert info.recipe == Recipe(INVERSION, w4a8_model.settings)


def test_checkpoint_has_the_specified_files(w4a8: Path) -> None:
    names = {"config.json", "model.safetensors", "recipe.toml"}
    assert {p.name for p in w4a8.iterdir()} == names


def test_recipe_file_is_the_recipe(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    assert load_recipe(w4a8 / "recipe.toml") == Recipe(INVERSION, w4a8_model.settings)


def test_the_size_of_the_weights_is_returned(tmp_path: Path, w4a8_model: QuantizedViT) -> None:
    size = save(tmp_path / "out", w4a8_model)
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_report_is_no_part_of_the_model(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    write_report(w4a8, {"agreement": 1.0})
    assert json.loads((w4a8 / "report.json").read_text()) == {"agreement": 1.0}
    images = some_images(w4a8_model)
    assert torch.equal(load(w4a8)(images), w4a8_model(images))


def test_same_model_gives_the_same_bytes(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    save(w4a8.parent / "again", w4a8_model)
    assert tree(w4a8.parent / "again") == tree(w4a8)


def test_files_that_were_put_beside_are_ignored(w4a8: Path, w4a8_model: QuantizedViT) -> None:
    (w4a8 / "notes.txt").write_text("note")
    (w4a8 / "recipe.toml").write_text("not = a recipe")
    images = some_images(w4a8_model)
    assert torch.equal(load(w4a8)(images), w4a8_model(images))


def test_fields_that_later_versions_add_to_the_configuration_are_ignored(w4a8: Path) -> None:
    change_config(w4a8, lambda c: c.update(later={"a": 1}))
    load(w4a8)


# the loaded module


def test_copy_of_a_used_model_gives_the_same_logits(w4a8: Path) -> None:
    model = load(w4a8)
    images = some_images(model)
    before = model(images)
    assert torch.equal(copy.deepcopy(model)(images), before)


def test_pickled_model_gives_the_same_logits(w4a8: Path) -> None:
    model = load(w4a8)
    images = some_images(model)
    before = model(images)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), before)


def test_pickle_of_a_used_model_is_no_larger(w4a8: Path) -> None:
    """The kernels' own copies of the weights stay out of it."""
    model = load(w4a8)
    fresh = len(pickle.dumps(model))
    model(some_images(model))
    assert len(pickle.dumps(model)) == fresh


def test_state_dict_of_a_used_model_has_the_same_tensors(w4a8: Path) -> None:
    model = load(w4a8)
    fresh = list(model.state_dict())
    model(some_images(model))
    assert list(model.state_dict()) == fresh


def test_state_dict_survives_torch_save(w4a8: Path) -> None:
    model = load(w4a8)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_loading_a_state_dict_changes_what_a_used_model_computes(w4a8: Path) -> None:
    model = load(w4a8)
    images = some_images(model)
    before = model(images)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["head.weight"].neg_()
    state["head.bias"].neg_()
    model.load_state_dict(state)
    assert torch.equal(model(images), -before)


def test_loaded_model_does_not_depend_on_its_files(w4a8: Path) -> None:
    model = load(w4a8)
    images = some_images(model)
    before = model(images)
    file = w4a8 / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert torch.equal(copy.deepcopy(model)(images), before)


def test_copy_does_not_share_weights(w4a8: Path) -> None:
    model = load(w4a8)
    duplicate = copy.deepcopy(model)
    assert isinstance(duplicate.head.bias, Tensor)
    duplicate.head.bias.add_(1)
    images = some_images(model)
    torch.testing.assert_close(duplicate(images), model(images) + 1)
