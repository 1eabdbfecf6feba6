"""Signal-to-quantization-noise ratios of layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dfq.inversion import Engine, plan_units
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.diagnosis import CEILING, layer_noise
from dfq.quantization.scheme import layers
from dfq.recipe import InversionSettings, QuantizationSettings
from dfq.results import LayerNoise
from dfq.sparse import SparseImages
from dfq.vit.load import LoadedModel

SETTINGS = InversionSettings(iterations=4, images=8, precision="float32", threads=1)


@pytest.fixture
def images(loaded: LoadedModel) -> list[SparseImages]:
    engine = Engine(loaded.vit, loaded.preprocessing, SETTINGS)
    return [b for unit in plan_units(SETTINGS, 16) for b in engine.run(unit)]


def build(loaded: LoadedModel, images: list[SparseImages], bits: int) -> QuantizedViT:
    settings = QuantizationSettings(bits=bits)  # type: ignore[arg-type]
    found = calibrate(loaded.vit, images, loaded.preprocessing, settings)
    return quantize_vit(loaded.vit, found, loaded.preprocessing, settings)


def noise(
    loaded: LoadedModel, images: list[SparseImages], quantized: QuantizedViT
) -> dict[str, LayerNoise]:
    return {n.name: n for n in layer_noise(loaded.vit, quantized, images)}


def test_every_layer_is_measured_and_both_errors_add(
    loaded: LoadedModel, images: list[SparseImages]
) -> None:
    found = noise(loaded, images, build(loaded, images, 8))
    assert list(found) == layers(loaded.vit.arch)
    for n in found.values():
        assert 20 < n.both < CEILING
        assert n.both < min(n.weights, n.activations) + 1


def test_fewer_bits_leave_more_noise(loaded: LoadedModel, images: list[SparseImages]) -> None:
    four = noise(loaded, images, build(loaded, images, 4))
    eight = noise(loaded, images, build(loaded, images, 8))
    for name in layers(loaded.vit.arch):
        if name.startswith("blocks"):
            assert four[name].weights + 4 < eight[name].weights
            assert abs(four[name].activations - eight[name].activations) < 0.01


def test_a_spoilt_layer_is_seen(loaded: LoadedModel, images: list[SparseImages]) -> None:
    quantized = build(loaded, images, 8)
    layer = quantized.get_submodule("blocks.1.mlp.fc2")
    layer.weight_scale.mul_(1.5)
    found = noise(loaded, images, quantized)
    assert min(found.values(), key=lambda n: n.both).name == "blocks.1.mlp.fc2"
    assert found["blocks.1.mlp.fc2"].activations > found["blocks.1.mlp.fc2"].weights + 10


def test_pixels_lose_nothing_in_the_patch_embedding(
    loaded: LoadedModel, images: list[SparseImages]
) -> None:
    found = noise(loaded, images, build(loaded, images, 8))
    assert found["patch_embed"].activations > 90


def test_the_models_are_left_as_they_are(loaded: LoadedModel, images: list[SparseImages]) -> None:
    quantized = build(loaded, images, 4)
    before = {k: v.clone() for k, v in quantized.state_dict().items()}
    layer_noise(loaded.vit, quantized, images)
    assert all(torch.equal(v, before[k]) for k, v in quantized.state_dict().items())
    assert not any(m._forward_pre_hooks for m in loaded.vit.modules())
    assert dataclasses.is_dataclass(LayerNoise)
