"""Block reconstruction: never worse on what is held out, for every family."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.inversion import Engine, plan_units
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.equalization import equalize
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.reconstruction import _embed, _error, fake_quantize_block, reconstruct
from dfq.quantization.scheme import Scheme
from dfq.recipe import AttentionMode, InversionSettings, QuantizationSettings
from dfq.results.values import BlockLoss
from dfq.sparse import SparseImages
from dfq.vit import Block, ViT
from dfq.vit.load import LoadedModel, load_model

SETTINGS = InversionSettings(
    iterations=4, images=32, stages=2, unit_size=8, precision="float32", threads=1
)
W4 = QuantizationSettings(bits=4, group=0)


def images_of(loaded: LoadedModel) -> list[SparseImages]:
    settings = SETTINGS
    if not loaded.vit.arch.num_classes:
        settings = dataclasses.replace(SETTINGS, importance="random")
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    patches = loaded.vit.arch.grid.patches
    return [b for unit in plan_units(settings, patches) for b in engine.run(unit)]


def quantize(
    loaded: LoadedModel, images: list[SparseImages], settings: QuantizationSettings = W4
) -> tuple[ViT, QuantizedViT]:
    calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(settings))
    equal, calibration = equalize(loaded.vit, calibration, settings.equalize)
    return equal, quantize_vit(equal, calibration, loaded.preprocessing, settings)


def learned(loaded: LoadedModel, steps: int = 20) -> tuple[QuantizedViT, list[BlockLoss]]:
    images = images_of(loaded)
    equal, quantized = quantize(loaded, images)
    return quantized, reconstruct(equal, quantized, images, steps)


def test_every_block_is_better_on_held_out_images(loaded: LoadedModel) -> None:
    _, losses = learned(loaded, 60)
    assert [loss.name for loss in losses] == ["blocks.0", "blocks.1"]
    assert all(loss.after < loss.before for loss in losses)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_no_block_of_any_family_gets_worse(family: Family) -> None:
    model = family.make()
    channels = model.get_parameter("patch_embed.proj.weight").shape[1]
    loaded = load_model(model, mean=[0.4] * channels, std=[0.25] * channels)
    _, losses = learned(loaded, 6)
    assert all(0 < loss.after <= loss.before for loss in losses)


@pytest.mark.parametrize("attention", ["float", "int8"])
@torch.no_grad()
def test_the_integer_block_is_as_good_as_what_was_learned(
    loaded: LoadedModel, attention: AttentionMode
) -> None:
    images = images_of(loaded)
    equal, quantized = quantize(loaded, images, dataclasses.replace(W4, attention=attention))

    def error() -> float:
        tokens = [t for t in _embed(equal, quantized, images) if t.held_out]
        for batch in tokens:
            batch.targets = equal.block(0)(batch.targets, batch.encoding, None)
        return _error(quantized.block(0), tokens, None)

    before = error()
    with torch.enable_grad():
        loss = reconstruct(equal, quantized, images, 60)[0]
    after = error()
    assert after < before
    assert after == pytest.approx(loss.after, rel=0.1)


def test_integers_stay_and_the_rest_moves(loaded: LoadedModel) -> None:
    images = images_of(loaded)
    equal, quantized = quantize(loaded, images)
    before = {k: v.clone() for k, v in quantized.state_dict().items()}
    reconstruct(equal, quantized, images, 60)
    changed = {k for k, v in quantized.state_dict().items() if not torch.equal(v, before[k])}
    assert all(k.startswith("blocks.") for k in changed)
    kinds = {k.rpartition(".")[2] for k in changed}
    assert kinds == {"weight_scale", "bias", "weight"}
    assert all("norm" in k for k in changed if k.endswith(".weight"))


def test_the_same_seed_gives_the_same_model(loaded: LoadedModel) -> None:
    (first, losses), (second, again) = learned(loaded), learned(loaded)
    assert losses == again
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@torch.no_grad()
def test_the_simulation_is_the_block(loaded: LoadedModel) -> None:
    _, quantized = quantize(loaded, images_of(loaded))
    target = quantized.set_backend("reference").blocks[0]
    assert isinstance(target, Block)
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    at = loaded.vit.position_encoding()
    fake_quantized = fake_quantize_block(loaded.vit.block(0), target)(x, at)
    actual = target(x.clone(), at)
    assert float((fake_quantized - actual).norm() / (actual - x).norm()) < 0.02


def test_gradients_reach_scales_biases_and_norms(loaded: LoadedModel) -> None:
    _, quantized = quantize(loaded, images_of(loaded))
    fake_quantized = fake_quantize_block(loaded.vit.block(0), quantized.block(0))
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    fake_quantized(x, loaded.vit.position_encoding()).square().sum().backward()
    gradients = {n: p.grad for n, p in fake_quantized.named_parameters() if p.requires_grad}
    layers = sum(isinstance(m, IntegerLinear) for m in quantized.block(0).modules())
    assert len(gradients) == 2 * layers + 4
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients.values())


def test_a_recipe_asks_for_it(tmp_path: Path, tiny: VisionTransformer) -> None:
    inversion = {"iterations": 4, "threads": 1, "precision": "float32", "unit_size": 2}
    settings: dict[str, Any] = {
        "inversion": inversion,
        "quantization": {"reconstruct": 5, "fractal": 4},
    }
    result = dfq.quantize(tiny, bits=4, out=tmp_path / "c", settings=settings)
    assert [b.name for b in result.blocks] == ["blocks.0", "blocks.1"]
    assert dfq.inspect(tmp_path / "c")["report"]["blocks"][0]["name"] == "blocks.0"
    dfq.load(tmp_path / "c")
