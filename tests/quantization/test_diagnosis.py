"""SQNR of layers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit

import dfq
from dfq.inversion import Engine, plan_units
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.diagnosis import LOW_SQNR, MAX_SQNR, layer_sqnr, low_sqnr_warnings
from dfq.quantization.scheme import Scheme, layers
from dfq.recipe import InversionSettings, QuantizationSettings
from dfq.results.values import LayerSqnr
from dfq.sparse import SparseImages
from dfq.vit.load import LoadedModel

SETTINGS = InversionSettings(iterations=4, images=8, precision="float32", threads=1)


@pytest.fixture
def images(loaded: LoadedModel) -> list[SparseImages]:
    engine = Engine(loaded.vit, loaded.preprocessing, SETTINGS)
    return [b for unit in plan_units(SETTINGS, 16) for b in engine.run(unit)]


def build(loaded: LoadedModel, images: list[SparseImages], bits: int) -> QuantizedViT:
    settings = QuantizationSettings(bits=bits)
    calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(settings))
    return quantize_vit(loaded.vit, calibration, loaded.preprocessing, settings)


def noise(
    loaded: LoadedModel, images: list[SparseImages], quantized: QuantizedViT
) -> dict[str, LayerSqnr]:
    return {n.name: n for n in layer_sqnr(loaded.vit, quantized, images)}


def test_every_layer_is_measured_and_both_errors_add(
    loaded: LoadedModel, images: list[SparseImages]
) -> None:
    sqnr = noise(loaded, images, build(loaded, images, 8))
    assert list(sqnr) == layers(loaded.vit.arch)
    for n in sqnr.values():
        assert 20 < n.both < MAX_SQNR
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
    layer.get_buffer("weight_scale").mul_(1.5)
    sqnr = noise(loaded, images, quantized)
    assert min(sqnr.values(), key=lambda n: n.both).name == "blocks.1.mlp.fc2"
    assert sqnr["blocks.1.mlp.fc2"].activations > sqnr["blocks.1.mlp.fc2"].weights + 10


def test_pixels_lose_nothing_in_the_patch_embedding(
    loaded: LoadedModel, images: list[SparseImages]
) -> None:
    sqnr = noise(loaded, images, build(loaded, images, 8))
    assert sqnr["patch_embed"].activations > 90


def test_the_models_are_left_as_they_are(loaded: LoadedModel, images: list[SparseImages]) -> None:
    quantized = build(loaded, images, 4)
    before = {k: v.clone() for k, v in quantized.state_dict().items()}
    layer_sqnr(loaded.vit, quantized, images)
    assert all(torch.equal(v, before[k]) for k, v in quantized.state_dict().items())
    assert not any(m._forward_pre_hooks for m in loaded.vit.modules())
    assert dataclasses.is_dataclass(LayerSqnr)


# ---- warnings


def of(name: str, weights: float, activations: float) -> LayerSqnr:
    powers = (10 ** (-ratio / 10) for ratio in (weights, activations))
    return LayerSqnr(name, weights, activations, -10 * math.log10(sum(powers)))


def test_layers_above_the_threshold_are_not_warned_of() -> None:
    healthy = [of("blocks.0.mlp.fc1", LOW_SQNR + 4, LOW_SQNR + 4), of("head", MAX_SQNR, MAX_SQNR)]
    assert low_sqnr_warnings(healthy, Scheme(QuantizationSettings(bits=4))) == []


@pytest.mark.parametrize(
    ("noise", "bits", "advice"),
    [
        (of("blocks.0.mlp.fc1", 8, 40), 4, "bits=8"),
        (of("blocks.0.mlp.fc1", 8, 40), 8, "reduce_range = false"),
        (of("head", 8, 40), 4, "reduce_range = false"),
        (of("blocks.1.attn.proj", 40, 8), 4, "observer to mse"),
    ],
)
def test_the_advice_is_that_of_what_is_noisy(noise: LayerSqnr, bits: Any, advice: str) -> None:
    scheme = Scheme(QuantizationSettings(bits=bits))
    (warning,) = low_sqnr_warnings([of("patch_embed", 40, 90), noise], scheme)
    assert f"below 15 dB in {noise.name} (8.0 dB): " in warning
    assert advice in warning
    every = {"bits=8", "reduce_range = false", "observer to mse"}
    assert not any(other in warning for other in every - {advice})


def test_the_worst_layers_are_named_and_the_rest_counted() -> None:
    noise = [of(f"blocks.{i}.mlp.fc2", 40, 14 - i) for i in range(5)]
    (warning,) = low_sqnr_warnings(noise, Scheme(QuantizationSettings()))
    assert "blocks.4.mlp.fc2 (10.0 dB), blocks.3.mlp.fc2 (11.0 dB), blocks.2.mlp.fc2" in warning
    assert "and 2 more" in warning
    assert "blocks.1" not in warning


@pytest.mark.parametrize("bits", [4, 8])
def test_the_result_and_its_report_warn_of_a_layer_that_is_noise(bits: Any, tmp_path: Path) -> None:
    """A hidden unit behind GELU, of which nothing is folded away, 3000 times wider."""
    model: Any = make_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[5] = 3000.0
        model.blocks[0].mlp.fc2.weight[:, 5] = 0
    fast: dict[str, Any] = {"images": 8, "iterations": 4, "stages": 2}
    result = dfq.quantize(model, bits=bits, out=tmp_path / "ckpt", **fast)
    (warning,) = [w for w in result.warnings if "dB" in w]
    assert "below 15 dB in blocks.0.mlp.fc2 (" in warning
    assert "observer to mse" in warning
    report = json.loads((tmp_path / "ckpt" / "report.json").read_text())
    assert warning in report["warnings"]
    fine = dfq.quantize(make_vit(), bits=bits, out=tmp_path / "fine", **fast)
    assert not [w for w in fine.warnings if "dB" in w]
