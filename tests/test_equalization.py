"""Ranges by channel, folded into layer norms and the layers after them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfq.inversion import Engine, plan_units
from dfq.quantization import calibrate, quantize_vit
from dfq.quantization.calibration import Calibration
from dfq.quantization.equalization import equalize, norm_layer_pairs
from dfq.recipe import InversionSettings, QuantizationSettings
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit.load import LoadedModel

SETTINGS = InversionSettings(iterations=4, images=8, precision="float32", threads=1)
W4 = QuantizationSettings(bits=4, attention="int8")


@pytest.fixture
def images(loaded: LoadedModel) -> list[SparseImages]:
    engine = Engine(loaded.vit, loaded.preprocessing, SETTINGS)
    return [b for unit in plan_units(SETTINGS, 16) for b in engine.run(unit)]


@pytest.fixture
def found(loaded: LoadedModel, images: list[SparseImages]) -> Calibration:
    for norm, _ in norm_layer_pairs(loaded.vit.arch):
        loaded.vit.get_parameter(f"{norm}.weight").data[3] *= 30
    return calibrate(loaded.vit, images, loaded.preprocessing, W4)


def inputs(loaded: LoadedModel, images: list[SparseImages]) -> tuple[Tensor, Tensor]:
    p = loaded.preprocessing
    x = pixels_to_input(images[0].patches, p, loaded.vit.arch.grid)
    return x, images[0].positions


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_the_function_stays(
    loaded: LoadedModel, images: list[SparseImages], found: Calibration, strength: float
) -> None:
    equal, _ = equalize(loaded.vit, found, strength)
    at = inputs(loaded, images)
    torch.testing.assert_close(
        equal.forward_sparse(*at), loaded.vit.forward_sparse(*at), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_statistics_are_those_of_the_changed_model(
    loaded: LoadedModel, images: list[SparseImages], found: Calibration, strength: float
) -> None:
    equal, moved = equalize(loaded.vit, found, strength)
    again = calibrate(equal, images, loaded.preprocessing, W4)
    for _, name in norm_layer_pairs(loaded.vit.arch):
        ours, theirs = moved.statistics[name], again.statistics[name]
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-3, atol=1e-3)
        assert ours.hessian is not None
        assert theirs.hessian is not None
        scale = float(theirs.hessian.abs().max())
        assert float((ours.hessian - theirs.hessian).abs().max()) < 1e-3 * scale
        low, high = moved.quantizers[name].range
        assert low <= float(theirs.low.min()) * 0.99
        assert high >= float(theirs.high.max()) * 0.99
    for site, theirs in again.heads.items():
        ours = moved.heads[site]
        torch.testing.assert_close(ours.low, theirs.low, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.high, theirs.high, rtol=1e-3, atol=1e-3)
        assert moved.quantizers[site].scale == pytest.approx(again.quantizers[site].scale, rel=1e-3)


def test_channels_span_their_own_ranges_at_full_strength(
    loaded: LoadedModel, found: Calibration
) -> None:
    _, moved = equalize(loaded.vit, found, 1.0)
    for _, name in norm_layer_pairs(loaded.vit.arch):
        spans = moved.statistics[name].high - moved.statistics[name].low
        torch.testing.assert_close(spans, spans.max().expand_as(spans), rtol=1e-3, atol=1e-3)


def test_an_outlier_channel_costs_less(
    loaded: LoadedModel, images: list[SparseImages], found: Calibration
) -> None:
    settings = QuantizationSettings(bits=8, reduce_range=False)
    at = inputs(loaded, images)
    expected = loaded.vit.forward_sparse(*at)

    def error(strength: float) -> float:
        equal, moved = equalize(loaded.vit, found, strength)
        quantized = quantize_vit(equal, moved, loaded.preprocessing, settings)
        return float((quantized.forward_sparse(*at) - expected).norm() / expected.norm())

    assert error(0.5) < 0.7 * error(0.0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_how_size_is_split_between_norm_and_layer_does_not_matter(
    loaded: LoadedModel, images: list[SparseImages], bits: int, seed: int
) -> None:
    """Trained models have channels a hundred times larger than others."""
    settings = QuantizationSettings(bits=bits)  # type: ignore[arg-type]
    at = inputs(loaded, images)
    expected = loaded.vit.forward_sparse(*at)

    def error() -> float:
        found = calibrate(loaded.vit, images, loaded.preprocessing, settings)
        equal, moved = equalize(loaded.vit, found, settings.equalize)
        quantized = quantize_vit(equal, moved, loaded.preprocessing, settings)
        return float((quantized.forward_sparse(*at) - expected).norm() / expected.norm())

    before = error()
    rescale(loaded, seed)
    torch.testing.assert_close(loaded.vit.forward_sparse(*at), expected, rtol=1e-3, atol=1e-3)
    assert error() == pytest.approx(before, rel=0.1)


def rescale(loaded: LoadedModel, seed: int) -> None:
    """Channels after layer norms times 0.01 to 100, the next layers' columns divided by it."""
    g = torch.Generator().manual_seed(seed)
    for norm, layer in norm_layer_pairs(loaded.vit.arch):
        column = loaded.vit.get_parameter(f"{layer}.weight").data
        factor = 10 ** (torch.rand(column.shape[1], generator=g) * 4 - 2)
        loaded.vit.get_parameter(f"{norm}.weight").data.mul_(factor)
        loaded.vit.get_parameter(f"{norm}.bias").data.mul_(factor)
        column.div_(factor)


def test_without_a_strength_nothing_changes(loaded: LoadedModel, found: Calibration) -> None:
    equal, moved = equalize(loaded.vit, found, 0.0)
    assert equal is loaded.vit
    assert moved is found
