"""Schemes by layer; models of any scheme run, are saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported_models import images_for, quantized_as, spread
from families import FAMILIES
from torch import Tensor

from dfq import checkpoint, runtime
from dfq.errors import CheckpointError, SettingError
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.scheme import Scheme
from dfq.recipe import LayerSettings, QuantizationSettings, Recipe
from dfq.runtime.params import KernelRequirements
from dfq.runtime.qtype import QType

FC2 = "blocks.1.mlp.fc2"


@pytest.mark.parametrize(
    ("settings", "layer", "bits", "low", "high", "input_bits"),
    [
        ({"bits": 8}, FC2, 8, -63, 63, 8),
        ({"bits": 8, "reduce_range": False}, FC2, 8, -127, 127, 8),
        ({"bits": 4}, FC2, 4, -8, 7, 8),
        ({"bits": 4, "input_bits": 4}, FC2, 4, -8, 7, 4),
        ({"bits": 4, "input_bits": 4}, "head", 8, -63, 63, 8),
        ({"bits": 4, "input_bits": 4}, "patch_embed", 8, -63, 63, 8),
        ({"bits": 7}, FC2, 7, -64, 63, 8),
        ({"bits": 2}, FC2, 2, -2, 1, 8),
        ({"layers": {"blocks.*.fc2": {"bits": 6, "input_bits": 5}}}, FC2, 6, -32, 31, 5),
        ({"layers": {"*": {"bits": 6}, "head": {"bits": 4}}}, "head", 4, -8, 7, 8),
        ({"layers": {"*": {"input_bits": 4}}}, "patch_embed", 8, -63, 63, 8),
    ],
)
def test_a_layer_has_the_scheme_that_settings_say(
    settings: dict[str, object], layer: str, bits: int, low: int, high: int, input_bits: int
) -> None:
    scheme = Scheme(QuantizationSettings(**settings)).for_layer(layer)  # type: ignore[arg-type]
    assert scheme.bits == bits
    assert (scheme.weight.qmin, scheme.weight.qmax) == (low, high)
    assert scheme.input == QType(input_bits)


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_stay_within_eight_bits(bits: int, reduce_range: bool) -> None:
    settings = QuantizationSettings(bits=bits, reduce_range=reduce_range)
    actual = Scheme(settings).for_layer(FC2)
    largest = actual.largest_group_scale if actual.group else 1
    low, high = actual.weight.qmin * largest, actual.weight.qmax * largest
    assert -(64 if reduce_range else 128) <= low
    assert high <= (63 if reduce_range else 127)


SCHEMES = [(4, 4), (6, 6), (3, 8), (5, 7), (2, 8), (7, 8)]


@pytest.mark.parametrize(("bits", "input_bits"), SCHEMES)
@torch.no_grad()
def test_any_scheme_is_saved_loaded_and_runs_on_every_backend(
    bits: int, input_bits: int, tmp_path: Path
) -> None:
    settings = QuantizationSettings(bits=bits, input_bits=input_bits)
    model = quantized_as(FAMILIES[0], settings)
    images = images_for(model)
    expected = model.set_backend("reference")(images)
    recipe = Recipe(quantization=settings)
    checkpoint.save_checkpoint(tmp_path / "c", model, name="x", recipe=recipe, source={})
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.settings == settings
    if runtime.explain("cpu", KernelRequirements(64))["onednn"] is None:
        assert loaded.backend == "onednn"
    assert spread(loaded(images), expected) < 1e-5
    assert torch.equal(loaded.set_backend("reference")(images), expected)


@torch.no_grad()
def test_inputs_of_fewer_bits_take_fewer_values() -> None:
    model = quantized_as(FAMILIES[0], QuantizationSettings(bits=8, input_bits=4))
    layer = model.get_submodule(FC2)
    assert isinstance(layer, IntegerLinear)
    seen: list[Tensor] = []
    forward = layer.integer_forward

    def watch(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(x)
        return forward(x, *args, **kwargs)  # type: ignore[arg-type]

    layer.integer_forward = watch  # type: ignore[method-assign]
    model(images_for(model))
    assert 2 < len(seen[0].unique()) <= 16
    assert int(seen[0].max()) <= 15


@torch.no_grad()
def test_fewer_bits_lose_more() -> None:
    def loss(bits: int, input_bits: int) -> float:
        settings = QuantizationSettings(bits=bits, input_bits=input_bits)
        model = quantized_as(FAMILIES[0], settings)
        exact = quantized_as(FAMILIES[0], QuantizationSettings(reduce_range=False))
        images = images_for(model)
        return spread(model(images), exact(images))

    assert loss(8, 8) < loss(6, 6) < loss(4, 4)


def test_exceptions_are_written_into_the_checkpoint_and_reproduced(tmp_path: Path) -> None:
    exception = {"blocks.*.mlp.fc2": LayerSettings(bits=8, input_bits=6)}
    settings = QuantizationSettings(bits=4, layers=exception)
    model = quantized_as(FAMILIES[0], settings)
    recipe = Recipe(quantization=settings)
    checkpoint.save_checkpoint(tmp_path / "c", model, name="x", recipe=recipe, source={})
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.scheme.name == "w4a8-mixed"
    layer, other = (loaded.get_submodule(f"blocks.0.mlp.{name}") for name in ("fc2", "fc1"))
    assert isinstance(layer, IntegerLinear)
    assert isinstance(other, IntegerLinear)
    assert (layer.bits, layer.scheme.input.bits, other.bits) == (8, 6, 4)
    assert checkpoint.read_info(tmp_path / "c").recipe.quantization == settings


def test_of_exceptions_that_match_a_layer_the_last_one_wins_on_disk_too(tmp_path: Path) -> None:
    exceptions = {"blocks.*": LayerSettings(bits=6), "*.attn.*": LayerSettings(bits=3)}
    settings = QuantizationSettings(bits=4, layers=exceptions)
    reversed_order = QuantizationSettings(bits=4, layers=dict(reversed(exceptions.items())))
    assert settings != reversed_order
    model = quantized_as(FAMILIES[0], settings)
    recipe = Recipe(quantization=settings)
    checkpoint.save_checkpoint(tmp_path / "c", model, name="x", recipe=recipe, source={})
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.settings == settings
    bits = {n: m.bits for n, m in loaded.named_modules() if isinstance(m, IntegerLinear)}
    assert (bits["blocks.0.mlp.fc1"], bits["blocks.0.attn.qkv"], bits["head"]) == (6, 3, 8)


def test_a_pattern_that_matches_no_layer_is_refused() -> None:
    settings = QuantizationSettings(layers={"blocks.*.mlp.fc3": LayerSettings(bits=8)})
    with pytest.raises(SettingError, match=r"fc3.*matches no layer.*patch_embed"):
        quantized_as(FAMILIES[0], settings)


def test_a_checkpoint_whose_pattern_matches_no_layer_is_damaged(tmp_path: Path) -> None:
    model = quantized_as(FAMILIES[0], QuantizationSettings())
    other = QuantizationSettings(layers={"blocks.7.*": LayerSettings(bits=4)})
    recipe = Recipe(quantization=other)
    checkpoint.save_checkpoint(tmp_path / "c", model, name="x", recipe=recipe, source={})
    with pytest.raises(CheckpointError, match=r"blocks\.7"):
        checkpoint.load(tmp_path / "c")
