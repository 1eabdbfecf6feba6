"""Ranges and rounding are right at any scale of activations and weights."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any, get_args

import pytest
import torch
from conftest import make_vit
from exported_models import layer_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import RunError
from dfq.inversion import Engine, plan_units
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.equalization import equalize
from dfq.quantization.rounding import search_scales
from dfq.quantization.scheme import Scheme
from dfq.recipe import InversionSettings, Observer, QuantizationSettings
from dfq.sparse import SparseImages
from dfq.vit import ViT
from dfq.vit.load import LoadedModel, load_model

SETTINGS = InversionSettings(iterations=4, images=8, precision="float32", threads=1)
OBSERVERS = get_args(Observer)
UNSCALED = ("patch_embed", "fc2")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(make_vit(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def images(model: LoadedModel) -> list[SparseImages]:
    engine = Engine(model.vit, model.preprocessing, SETTINGS)
    return [b for unit in plan_units(SETTINGS, 16) for b in engine.run(unit)]


@torch.no_grad()
def scaled(vit: ViT, factor: float, *, attention: bool = True) -> ViT:
    """The same function with the inputs of its linear layers scaled, and what attention takes."""
    vit = copy.deepcopy(vit)

    def move(writer: str, reader: str, rows: slice = slice(None)) -> None:
        for parameter in ("weight", "bias"):
            vit.get_parameter(f"{writer}.{parameter}")[rows] *= factor
        vit.get_parameter(f"{reader}.weight").div_(factor)

    for i in range(vit.arch.depth):
        block, width = f"blocks.{i}", vit.arch.attention_dim
        move(f"{block}.norm1", f"{block}.attn.qkv")
        move(f"{block}.norm2", f"{block}.mlp.fc1")
        if not attention:
            continue
        move(f"{block}.attn.qkv", f"{block}.attn.proj", slice(2 * width, 3 * width))
        qkv = f"{block}.attn.qkv"
        for name in ("weight", "bias"):
            parameter = vit.get_parameter(f"{qkv}.{name}")
            parameter[:width] *= factor
            parameter[width : 2 * width] /= factor
    move("norm", "head")
    return vit


def quantized(
    model: LoadedModel, vit: ViT, images: list[SparseImages], settings: QuantizationSettings
) -> QuantizedViT:
    calibration = calibrate(vit, images, model.preprocessing, Scheme(settings))
    return quantize_vit(
        *equalize(vit, calibration, settings.equalize), model.preprocessing, settings
    )


def integers(model: QuantizedViT) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not v.is_floating_point()}


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20], ids=["2^-20", "2^20"])
@pytest.mark.parametrize(
    ("observer", "bits"), [*product(OBSERVERS, [8]), ("minmax", 4), ("percentile", 4), ("mse", 4)]
)
def test_powers_of_two_change_no_integer(
    observer: Observer, bits: Any, factor: float, model: LoadedModel, images: list[SparseImages]
) -> None:
    chosen = QuantizationSettings(bits=bits, observer=observer, equalize=0.0, attention="int8")
    ours = integers(quantized(model, model.vit, images, chosen))
    theirs = integers(quantized(model, scaled(model.vit, factor), images, chosen))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(("bits", "strength"), [(8, 0.0), (4, 0.5)])
def test_no_scale_of_activations_matters(
    bits: Any,
    strength: float,
    observer: Observer,
    factor: float,
    model: LoadedModel,
    images: list[SparseImages],
) -> None:
    """Factors that are no powers of two round, which moves a few weights near a half."""
    chosen = QuantizationSettings(bits=bits, observer=observer, equalize=strength)
    first = quantized(model, model.vit, images, chosen)
    vit = scaled(model.vit, factor, attention=not strength)
    second = quantized(model, vit, images, chosen)
    off = [(integers(second)[k] != v).float().mean() for k, v in integers(first).items()]
    assert float(torch.stack(off).mean()) < 0.01
    for name, qparams in second.activation_qparams().items():
        by = factor if not strength and not name.endswith(UNSCALED) else 1.0
        expected = first.activation_qparams()[name].scale * by
        assert qparams.scale == pytest.approx(expected, rel=1e-3), name


# ---- activations without a range


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_an_input_that_is_not_finite_is_named(
    observer: Observer, value: float, model: LoadedModel, images: list[SparseImages]
) -> None:
    vit = copy.deepcopy(model.vit)
    vit.get_parameter("blocks.1.norm2.bias").data[3] = value
    chosen = QuantizationSettings(observer=observer)
    with pytest.raises(RunError, match=r"input of 'blocks\.1\.mlp\.fc1' is not finite"):
        calibrate(vit, images, model.preprocessing, Scheme(chosen))
    assert not any(m._forward_pre_hooks for m in vit.modules())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(("row", "site"), [(0, "q"), (64, "k"), (128, "v")])
def test_queries_keys_and_values_that_are_not_finite_are_named(
    row: int, site: str, observer: Observer, model: LoadedModel, images: list[SparseImages]
) -> None:
    vit = copy.deepcopy(model.vit)
    vit.get_parameter("blocks.0.attn.qkv.bias").data[row] = torch.inf
    chosen = QuantizationSettings(observer=observer, attention="int8")
    with pytest.raises(RunError, match=rf"'blocks\.0\.attn\.{site}' of attention is not finite"):
        calibrate(vit, images, model.preprocessing, Scheme(chosen))


def test_squares_that_overflow_are_named(model: LoadedModel, images: list[SparseImages]) -> None:
    vit = scaled(model.vit, 1e19)
    p = model.preprocessing
    with pytest.raises(RunError, match=r"input of 'blocks\.0\.attn\.qkv' reaches .*nearest"):
        calibrate(vit, images, p, Scheme(QuantizationSettings(bits=4)))
    chosen = QuantizationSettings(bits=4, rounding="nearest")
    ours = integers(quantized(model, model.vit, images, chosen))
    vit = scaled(model.vit, 1e19, attention=False)
    theirs = integers(quantized(model, vit, images, chosen))
    same = [(theirs[k] == v).float().mean() for k, v in ours.items()]
    assert float(torch.stack(same).mean()) > 0.99


@settings(max_examples=30)
@given(st.integers(-90, 90), st.integers(-90, 90), st.sampled_from([0, 32]))
def test_scales_of_weights_follow_weights_and_not_importances(
    weights: int, importances: int, group: int
) -> None:
    g = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(6, 70, generator=g), torch.rand(70, generator=g) ** 4
    weight[2] = 0
    scheme = layer_scheme(4, group=group)
    ours = search_scales(weight, scheme, importance)
    theirs = search_scales(weight * 2.0**weights, scheme, importance * 2.0**importances)
    rows = torch.arange(6) != 2
    assert torch.equal(theirs.channel[rows], ours.channel[rows] * 2.0**weights)
    assert bool((theirs.channel > 0).all())
    if group:
        assert theirs.group is not None
        assert ours.group is not None
        assert torch.equal(theirs.group, ours.group)
