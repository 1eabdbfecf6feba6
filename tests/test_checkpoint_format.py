"""Checkpoints beside a reader written from docs/checkpoint-format.md with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from documented_reader import F32, DocumentedReader
from families import FAMILIES
from safetensors.numpy import load as load_numpy
from saved_checkpoints import VARIANTS, quantized, save

from dfq.checkpoint import load
from dfq.recipe import QuantizationSettings
from dfq.vit.load import LoadedModel, load_model

DOCUMENTED: list[tuple[int, str, str]] = [
    (8, "float", "rectangles"),
    (4, "int8", "odd"),
    (8, "int8", "average"),
    (4, "float", "registers"),
    (4, "int8", "normed"),
    (8, "float", "quick"),
    (4, "float", "tanh"),
    *[(8, "float", family.name) for family in FAMILIES],
    (4, "int8", "BEiT, BEiTv2"),
    (4, "int8", "DINOv3, SwiGLU"),
    (4, "float", "SigLIP towers"),
]


@pytest.mark.parametrize(("bits", "attention", "variant"), DOCUMENTED)
def test_reader_written_from_the_specification_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Any, attention: Any, variant: str
) -> None:
    """A sum in another order may move an activation by a level; a misreading moves them all."""
    monkeypatch.setattr("dfq.quantization.model.attention_dtype", lambda _: torch.float32)
    family = {family.name: family.make for family in FAMILIES}.get(variant)
    built = family() if family else make_vit(**VARIANTS[variant])
    loaded = load_model(built, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    settings = QuantizationSettings(bits=bits, attention=attention, group=16)
    save(tmp_path / "out", quantized(loaded, settings))
    model = load(tmp_path / "out").set_backend("reference")
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, *model.arch.image_size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std)
    )
    expected = model((pixels / 255 - mean) / std).numpy()
    actual = DocumentedReader(tmp_path / "out")(pixels.numpy())
    assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "attention"), [(8, "float"), (4, "int8")])
def test_specified_tensors_are_the_stored_ones(
    tmp_path: Path, loaded: LoadedModel, bits: Any, attention: Any
) -> None:
    save(tmp_path, quantized(loaded, QuantizationSettings(bits=bits, attention=attention)))
    tensors = load_numpy((tmp_path / "model.safetensors").read_bytes())
    packed = bits == 4
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "prefix": ("float32", (1, 64)),
        "pos_embed": ("float32", (16, 64)),
    }

    def norm(name: str) -> None:
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = ("float32", (64,))

    def linear(name: str, inputs: int, outputs: int, packed: bool) -> None:
        columns = (inputs + 1) // 2 if packed else inputs
        expected[f"{name}.weight"] = ("uint8" if packed else "int8", (outputs, columns))
        if packed:
            expected[f"{name}.group_scale"] = ("uint8", (outputs, -(-inputs // 32)))
        expected[f"{name}.weight_scale"] = expected[f"{name}.bias"] = ("float32", (outputs,))
        expected[f"{name}.input_scale"] = ("float32", ())
        expected[f"{name}.input_zero_point"] = ("int32", ())

    linear("patch_embed", 48, 64, packed=False)
    linear("head", 64, 5, packed=False)
    norm("norm")
    for i in range(2):
        norm(f"blocks.{i}.norm1")
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.attn.qkv", 64, 192, packed)
        linear(f"blocks.{i}.attn.proj", 64, 64, packed)
        linear(f"blocks.{i}.mlp.fc1", 64, 256, packed)
        linear(f"blocks.{i}.mlp.fc2", 256, 64, packed)
        if attention == "int8":
            expected[f"blocks.{i}.attn.product.scales"] = ("float32", (3,))
    assert {k: (str(t.dtype), t.shape) for k, t in tensors.items()} == expected


def test_activation_ranges_are_as_specified(w4a8: Path) -> None:
    tensors = load_numpy((w4a8 / "model.safetensors").read_bytes())
    ranges = json.loads((w4a8 / "config.json").read_text())["activation_ranges"]
    expected: dict[str, list[float]] = {}
    for name in tensors:
        if name.endswith(".input_scale"):
            site = name.removesuffix(".input_scale")
            s, z = float(tensors[name]), int(tensors[f"{site}.input_zero_point"])
            expected[site] = [-z * s, (255 - z) * s]
        elif name.endswith(".product.scales"):
            block = name.removesuffix(".product.scales")
            scales = tensors[name].astype(float).tolist()
            for site, s in zip("qkv", scales, strict=True):
                expected[f"{block}.{site}"] = [-127 * s, 127 * s]
    assert ranges.keys() == expected.keys()
    for site, bounds in expected.items():
        assert ranges[site] == pytest.approx(bounds)
    assert len(ranges) == 16


def test_patch_embedding_takes_pixels_as_they_are(w4a8: Path) -> None:
    tensors = load_numpy((w4a8 / "model.safetensors").read_bytes())
    assert tensors["patch_embed.input_scale"] == F32(1 / 255)
    assert tensors["patch_embed.input_zero_point"] == 0


def test_normalization_is_folded_into_the_patch_embedding(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    save(tmp_path, quantized(loaded, QuantizationSettings()))
    tensors = load_numpy((tmp_path / "model.safetensors").read_bytes())
    mean, std = (np.repeat(v, 16) for v in (loaded.preprocessing.mean, loaded.preprocessing.std))
    assert isinstance(loaded.vit.patch_embed, torch.nn.Linear)
    weight = loaded.vit.patch_embed.weight.numpy() / std
    stored = tensors["patch_embed.weight"] * tensors["patch_embed.weight_scale"][:, None]
    bias = loaded.vit.patch_embed.bias.numpy() - stored @ mean
    np.testing.assert_allclose(tensors["patch_embed.bias"], bias, rtol=1e-4, atol=1e-5)
    assert np.abs(stored - weight).mean() < 0.02 * np.abs(weight).mean()


@pytest.mark.parametrize(
    ("bits", "reduced", "low", "high"),
    [(4, False, -128, 112), (8, False, -127, 127), (4, True, -64, 56), (8, True, -63, 63)],
)
def test_weights_are_in_the_specified_range(
    tmp_path: Path, loaded: LoadedModel, bits: Any, reduced: bool, low: int, high: int
) -> None:
    model = quantized(loaded, QuantizationSettings(bits=bits, reduce_range=reduced))
    save(tmp_path / "out", model)
    reader = DocumentedReader(tmp_path / "out")
    for i in range(2):
        for layer, inputs in (("attn.qkv", 64), ("mlp.fc2", 256)):
            weight = reader.weight(f"blocks.{i}.{layer}", inputs)
            assert low <= weight.min() < low / 2
            assert high / 2 < weight.max() <= high
