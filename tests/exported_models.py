"""Quantized members of every family, and the demo, for tests of exports."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import make_vit
from families import FAMILIES, VARIANTS, Family
from torch import Tensor

import dfq
from dfq import demo
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.scheme import LayerScheme, Scheme
from dfq.recipe import QuantizationSettings
from dfq.runtime.qtype import INT8, QType
from dfq.sparse import SparseImages, patchify
from dfq.vit import ViT
from dfq.vit.load import load_model

W8: dict[str, Any] = {"bits": 8, "attention": "float"}

MEMBERS = [pytest.param(f, id=f.name) for f in [*FAMILIES, *VARIANTS]]


def layer_scheme(bits: int, **settings: Any) -> LayerScheme:
    """How a block's layer is quantized with so many bits."""
    return Scheme(QuantizationSettings(bits=bits, **settings)).for_layer("blocks.0.attn.qkv")


def allow_lowest_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have signed activations reach -128, as ONNX has them; the reference ends at -127."""
    qmin = cast(property, QType.qmin)
    lowest = property(lambda qtype: -128 if qtype == INT8 else qmin.__get__(qtype))
    monkeypatch.setattr(QType, "qmin", lowest)


@cache
def quantized(family: Family, *, bits: int, attention: Any) -> QuantizedViT:
    """A member of a family, calibrated on random pixels, on the reference kernels."""
    settings = QuantizationSettings(bits=bits, attention=attention)
    return quantized_as(family, settings).set_backend("reference")


def quantized_as(family: Family, settings: QuantizationSettings) -> QuantizedViT:
    """A member of a family, calibrated on random pixels."""
    module = family.make()
    channels = module.get_parameter("patch_embed.proj.weight").shape[1]
    loaded = load_model(module, mean=[0.4] * channels, std=[0.25] * channels)
    found = calibrate(loaded.vit, [_noise(loaded.vit)], loaded.preprocessing, Scheme(settings))
    return quantize_vit(loaded.vit, found, loaded.preprocessing, settings)


def _noise(vit: ViT, count: int = 8) -> SparseImages:
    generator = torch.Generator().manual_seed(0)
    shape = (count, vit.arch.grid.patches, vit.arch.grid.patch_values)
    return _whole(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def _whole(patches: Tensor) -> SparseImages:
    """Images of which all patches are there."""
    count, length, _ = patches.shape
    zeros = torch.zeros(count, dtype=torch.int64)
    positions = torch.arange(length).expand(count, -1)
    return SparseImages(patches, positions, zeros, zeros, torch.arange(count))


def images_for(vit: ViT, count: int = 8) -> Tensor:
    """Normalised images of random pixels."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, vit.arch.in_channels, *vit.arch.image_size)
    return (torch.randint(0, 256, shape, generator=generator) / 255 - 0.4) / 0.25


def spread(found: Tensor, expected: Tensor) -> float:
    """Error as a share of how much the expected values differ between images."""
    return float((found - expected).norm() / (expected - expected.mean(0)).norm())


@cache
def demo_images(count: int) -> Tensor:
    """The demo's first test images, normalised."""
    pixels = np.load(demo.TEST_SLICE)["x"][:count]
    return (torch.from_numpy(pixels)[:, None] / 255 - demo.MEAN[0]) / demo.STD[0]


@cache
def quantized_demo(bits: int, attention: Any) -> QuantizedViT:
    """The demo model, calibrated on its own test images."""
    loaded = load_model("demo")
    pixels = torch.from_numpy(np.load(demo.TEST_SLICE)["x"][-16:])[:, None]
    patches = patchify(pixels, loaded.vit.arch.grid)
    settings = QuantizationSettings(bits=bits, attention=attention)
    found = calibrate(loaded.vit, [_whole(patches)], loaded.preprocessing, Scheme(settings))
    return quantize_vit(loaded.vit, found, loaded.preprocessing, settings)


def checkpoint_of(path: Path, *, bits: int = 8, attention: str = "float", seed: int = 0) -> Path:
    """A checkpoint of the small ViT of conftest, calibrated on random noise."""
    dfq.quantize(
        make_vit(seed),
        bits=bits,
        attention=attention,
        calibration="noise",
        images=4,
        settings={"inversion": {"threads": 1}},
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        out=path,
        cache=path.parent / "cache",
    )
    return path
