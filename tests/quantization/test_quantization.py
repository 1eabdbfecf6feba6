"""Calibration, and the quantized model beside the float one."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit

from dfq.errors import DataError, DatasetError, SettingError
from dfq.inversion import Engine, plan_units
from dfq.quantization import IntegerLinear, QuantizedViT, calibrate, quantize_vit
from dfq.quantization.observers import RangeObserver
from dfq.quantization.scheme import ATTENTION_INPUTS, Scheme, layers
from dfq.recipe import InversionSettings, QuantizationSettings
from dfq.runtime import onednn
from dfq.runtime.params import KernelRequirements
from dfq.runtime.qtype import INT8
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Preprocessing
from dfq.vit.load import LoadedModel, load_model


def invert(loaded: LoadedModel, **changes: Any) -> list[SparseImages]:
    settings = dataclasses.replace(
        InversionSettings(iterations=8, images=32, stages=2, precision="float32", threads=1),
        **changes,
    )
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    return [i for u in plan_units(settings, loaded.vit.arch.grid.patches) for i in engine.run(u)]


def quantize(
    loaded: LoadedModel, images: list[SparseImages] | None = None, **settings: Any
) -> QuantizedViT:
    chosen = QuantizationSettings(**settings)
    images = invert(loaded) if images is None else images
    calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(chosen))
    return quantize_vit(loaded.vit, calibration, loaded.preprocessing, chosen)


def images_of(loaded: LoadedModel, count: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=g)
    mean = torch.tensor(loaded.preprocessing.mean)[:, None, None]
    return (pixels / 255 - mean) / torch.tensor(loaded.preprocessing.std)[:, None, None]


def error(loaded: LoadedModel, quantized: QuantizedViT) -> float:
    """Error of the logits relative to their spread, on images calibrated on."""
    x = images_of(loaded)
    exact = loaded.vit(x)
    return float((quantized(x) - exact).norm() / (exact - exact.mean(0)).norm())


def real_images(loaded: LoadedModel) -> list[SparseImages]:
    from dfq.sparse import input_to_pixels, patchify

    p, grid = loaded.preprocessing, loaded.vit.arch.grid
    patches = input_to_pixels(patchify(images_of(loaded), grid), p, grid)
    none = torch.zeros(len(patches), dtype=torch.int64)
    return [SparseImages(patches, torch.arange(16).expand(len(patches), -1), none, none, none)]


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_w8a8_is_close_to_float(loaded: LoadedModel, attention: str) -> None:
    quantized = quantize(loaded, real_images(loaded), bits=8, attention=attention)
    assert error(loaded, quantized) < 0.1


def test_w4a8_is_between_nothing_and_w8a8(loaded: LoadedModel) -> None:
    images = real_images(loaded)
    eight = error(loaded, quantize(loaded, images, bits=8))
    four = error(loaded, quantize(loaded, images, bits=4))
    nearest = error(loaded, quantize(loaded, images, bits=4, rounding="nearest"))
    assert eight < four < nearest < 1


@pytest.mark.parametrize(
    "changes", [{"pool": "avg"}, {"act": "quick"}, {"backbone": True}], ids=str
)
def test_variants_run_on_integers(changes: dict[str, Any]) -> None:
    from timm.layers import QuickGELU

    args: dict[str, Any] = {}
    if "pool" in changes:
        args = {"class_token": False, "global_pool": "avg"}
    if "act" in changes:
        args = {"act_layer": QuickGELU, "pre_norm": True}
    if "backbone" in changes:
        args = {"num_classes": 0}
    loaded = load_model(make_vit(**args), mean=(0.5,) * 3, std=(0.25,) * 3)
    quantized = quantize(loaded, real_images(loaded), bits=8)
    assert error(loaded, quantized) < 0.15


def test_every_linear_layer_runs_on_integers(loaded: LoadedModel) -> None:
    quantized = quantize(loaded, bits=4)
    kinds = {name: quantized.get_submodule(name) for name in layers(loaded.vit.arch)}
    assert all(isinstance(m, IntegerLinear) for m in kinds.values())
    assert not any(type(m) is torch.nn.Linear for m in quantized.modules())
    bits = {name: m.bits for name, m in kinds.items() if isinstance(m, IntegerLinear)}
    assert bits.pop("patch_embed") == bits.pop("head") == 8
    assert set(bits.values()) == {4}


def test_the_patch_embedding_reads_pixels_without_error(loaded: LoadedModel) -> None:
    quantized = quantize(loaded, bits=8)
    layer = quantized.patch_embed
    assert isinstance(layer, IntegerLinear)
    images = real_images(loaded)[0]
    p = loaded.preprocessing
    x = pixels_to_input(images.patches, p, loaded.vit.arch.grid)
    assert torch.equal(layer.quantize_input(x), images.patches)


def test_fast_and_reference_kernels_agree_on_the_model(loaded: LoadedModel) -> None:
    if onednn.unsupported_reason(torch.device("cpu"), KernelRequirements()) is not None:
        pytest.skip("this processor has no VNNI")
    quantized = quantize(loaded, bits=8)
    x = images_of(loaded)
    fast = quantized(x)
    slow = quantized.set_backend("reference")(x)
    assert quantized.backend == "reference"
    spread = (slow - slow.mean(0)).norm()
    assert float((fast - slow).norm() / spread) < 0.03


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_size(loaded: LoadedModel, batch: int) -> None:
    quantized = quantize(loaded, bits=4, attention="int8")
    assert quantized(images_of(loaded)[:batch]).shape == (batch, 5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 24, 24),
        torch.zeros(1, 3, 8, 16),
        torch.zeros(1, 1, 16, 16),
        torch.zeros(3, 16, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        np.zeros((1, 3, 16, 16), np.float32),
    ],
    ids=lambda x: f"{type(x).__name__} {x.dtype} {list(x.shape)}",
)
def test_images_of_another_kind_are_refused(loaded: LoadedModel, images: Any) -> None:
    quantized = quantize(loaded, invert(loaded))
    for model in (quantized, loaded.vit):
        with pytest.raises(DataError, match=r"a floating-point tensor \[B, 3, 16, 16\]; got "):
            model(images)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_has_no_prediction(loaded: LoadedModel, value: float) -> None:
    quantized, images = quantize(loaded, invert(loaded)), images_of(loaded, 3)
    expected = quantized(images)
    images[1, 0, 5, 5] = value
    actual = quantized(images)
    assert actual[1].isnan().all()
    assert torch.equal(actual[::2], expected[::2])


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_a_quantized_model_keeps_its_types(loaded: LoadedModel, change: str) -> None:
    quantized = quantize(loaded, invert(loaded))
    for module in (quantized, quantized.head):
        with pytest.raises(SettingError, match="cannot change its type"):
            getattr(module, change)()
    assert quantized.to("cpu")(images_of(loaded, 1)).isfinite().all()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_the_same_logits(loaded: LoadedModel, copier: Any) -> None:
    quantized = quantize(loaded, bits=4)
    x = images_of(loaded)
    expected = quantized(x)
    assert torch.equal(copier(quantized)(x), expected)


def test_state_dict_carries_a_model_over(loaded: LoadedModel) -> None:
    images = invert(loaded)
    first, other = quantize(loaded, images, bits=4), quantize(loaded, images[:1], bits=4)
    x = images_of(loaded)
    expected, before = first(x), other(x)
    assert not torch.equal(before, expected)
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(x), expected)


def test_the_float_model_is_left_as_it_is(loaded: LoadedModel) -> None:
    before = {k: v.clone() for k, v in loaded.vit.state_dict().items()}
    quantize(loaded, bits=4)
    assert all(torch.equal(v, before[k]) for k, v in loaded.vit.state_dict().items())
    assert not loaded.vit.get_submodule("blocks.0.attn.qkv")._forward_pre_hooks


def test_calibration_sees_kept_patches_at_their_positions(loaded: LoadedModel) -> None:
    images = invert(loaded)
    calibration = calibrate(
        loaded.vit, images, loaded.preprocessing, Scheme(QuantizationSettings())
    )
    p = loaded.preprocessing
    inputs = []
    for b in images:
        x = pixels_to_input(b.patches, p, loaded.vit.arch.grid)
        inputs.append(loaded.vit.block(0).norm1(loaded.vit.embed(x, b.positions)).flatten(0, 1))
    x = torch.cat(inputs)
    site = "blocks.0.attn.qkv"
    low, high = calibration.qparams[site].range
    assert low <= float(x.min()) + calibration.qparams[site].scale
    assert high >= float(x.max()) - calibration.qparams[site].scale
    assert high - low < 1.02 * float(x.max() - x.min())
    torch.testing.assert_close(calibration.statistics[site].mean, x.mean(0), rtol=1e-4, atol=1e-5)


def test_hessians_are_second_moments(loaded: LoadedModel) -> None:
    images = invert(loaded)[:1]
    calibration = calibrate(
        loaded.vit, images, loaded.preprocessing, Scheme(QuantizationSettings(bits=4))
    )
    p = loaded.preprocessing
    x = pixels_to_input(images[0].patches, p, loaded.vit.arch.grid)
    x = loaded.vit.block(0).norm1(loaded.vit.embed(x, images[0].positions)).flatten(0, 1)
    hessian = calibration.statistics["blocks.0.attn.qkv"].hessian
    assert hessian is not None
    torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_hessians_are_only_collected_where_they_are_used(loaded: LoadedModel) -> None:
    images = invert(loaded)[:1]
    for settings in (
        QuantizationSettings(bits=8),
        QuantizationSettings(bits=4, rounding="nearest"),
    ):
        calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(settings))
        assert all(s.hessian is None for s in calibration.statistics.values())


def test_an_empty_calibration_set_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(DatasetError, match="no images"):
        calibrate(loaded.vit, [], loaded.preprocessing, Scheme(QuantizationSettings()))


def test_integer_attention_has_a_range_for_each_operand(loaded: LoadedModel) -> None:
    quantized = quantize(loaded, attention="int8")
    for site in ATTENTION_INPUTS:
        qparams = quantized.activation_qparams()[f"blocks.0.{site}"]
        assert qparams.zero_point == 0
        assert qparams.qtype.signed


@pytest.mark.parametrize("kind", ["minmax", "moving_average", "histogram"])
def test_observers_cover_what_they_saw(kind: Any) -> None:
    x = torch.linspace(-1.0, 3.0, 1000)
    observer = RangeObserver(kind)
    observer.observe(x)
    qparams = observer.calculate_qparams()
    low, high = qparams.range
    assert low == pytest.approx(-1.0, abs=0.1)
    assert high == pytest.approx(3.0, abs=0.1)
    assert (0 - low) / qparams.scale == pytest.approx(qparams.zero_point)


def test_signed_observers_are_symmetric() -> None:
    observer = RangeObserver("minmax", INT8)
    observer.observe(torch.tensor([-0.5, 2.0]))
    low, high = observer.calculate_qparams().range
    assert low == -high
    assert high == pytest.approx(2.0, rel=0.01)


def test_preprocessing_is_folded_for_every_channel_count() -> None:
    loaded = load_model(make_vit(in_chans=2), mean=(0.1, 0.9), std=(0.05, 0.5))
    assert loaded.preprocessing == Preprocessing((0.1, 0.9), (0.05, 0.5), "bicubic", 0.875)
    quantized = quantize(loaded, invert(loaded), bits=8)
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 2, 16, 16), generator=g) / 255
    x = (pixels - torch.tensor([0.1, 0.9])[:, None, None]) / torch.tensor([0.05, 0.5])[
        :, None, None
    ]
    exact = loaded.vit.embed(
        x.reshape(3, 2, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 32)
    )
    actual = quantized.embed(
        x.reshape(3, 2, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 32)
    )
    assert float((actual - exact).norm() / exact.norm()) < 0.02
