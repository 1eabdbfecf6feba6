"""Checkpoints beside a reader written from docs/checkpoint-format.md with numpy alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from families import FAMILIES
from safetensors.numpy import load as load_numpy
from saved_checkpoints import VARIANTS, quantized, save

from dfq.checkpoint import load
from dfq.recipe import QuantizationSettings
from dfq.vit.load import LoadedModel, load_model

Array = np.ndarray


F32 = np.float32


class DocumentedReader:
    """A checkpoint's forward pass as the specification says it."""

    def __init__(self, path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        self.arch, self.recipe = config["architecture"], config["recipe"]["quantization"]
        self.preprocessing = config["preprocessing"]
        self.tensors = load_numpy((path / "model.safetensors").read_bytes())

    def norm(self, name: str, x: Array) -> Array:
        if f"{name}.weight" not in self.tensors:
            return x
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / np.sqrt(variance + F32(self.arch["norm_eps"]))
        return normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    @staticmethod
    def quantize(x: Array, s: Array, z: Array) -> Array:
        return np.clip(np.rint(x.astype(F32) / s) + z, 0, 255).astype(np.int64)

    def weight(self, name: str, inputs: int) -> Array:
        stored = self.tensors[f"{name}.weight"]
        if stored.dtype == np.int8:
            return stored.astype(np.int64)
        nibbles = np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)
        integers = np.where(nibbles < 8, nibbles, nibbles.astype(np.int64) - 16)[:, :inputs]
        if f"{name}.group_scale" in self.tensors:
            groups = np.arange(inputs) // self.recipe["group"]
            integers = integers * self.tensors[f"{name}.group_scale"][:, groups]
        return integers

    def linear(self, name: str, x: Array) -> Array:
        s, z = (self.tensors[f"{name}.input_{p}"] for p in ("scale", "zero_point"))
        sums = (self.quantize(x, s, z) - z) @ self.weight(name, x.shape[-1]).T
        scale = self.tensors[f"{name}.weight_scale"] * s
        return sums.astype(F32) * scale + self.tensors[f"{name}.bias"]

    @staticmethod
    def softmax(x: Array) -> Array:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def rotate(self, x: Array) -> Array:
        if not self.arch["rope"]:
            return x
        first, half = self.arch["num_prefix_tokens"], self.arch["head_dim"] // 2
        sin, cos = np.split(self.tensors["rope"], 2, axis=1)
        patches = x[:, :, first:]
        turned = np.concatenate([-patches[..., half:], patches[..., :half]], -1)
        return np.concatenate([x[:, :, :first], patches * cos + turned * sin], 2)

    def bias(self, name: str) -> Array:
        if not self.arch["relative_bias"]:
            return np.zeros(1, F32)
        table = self.tensors[f"{name}.relative_bias"]
        (ph, pw), (height, width) = self.arch["patch_size"], self.arch["image_size"]
        rows, columns = height // ph, width // pw
        n, count = len(table), rows * columns
        entry = np.zeros((count + 1, count + 1), int)
        for i in range(count):
            for j in range(count):
                down = i // columns - j // columns + rows - 1
                right = i % columns - j % columns + columns - 1
                entry[1 + i, 1 + j] = down * (2 * columns - 1) + right
        entry[0, :], entry[:, 0], entry[0, 0] = n - 3, n - 2, n - 1
        return table[entry].transpose(2, 0, 1)

    def attention(self, name: str, x: Array) -> Array:
        b, t, _ = x.shape
        heads, width = self.arch["num_heads"], self.arch["head_dim"]
        qkv = self.linear(f"{name}.qkv", x).reshape(b, t, 3, heads, width)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k, bias = self.rotate(q), self.rotate(k), self.bias(name)
        if self.recipe["attention"] == "float":
            y = self.softmax(q @ k.swapaxes(-1, -2) * F32(width**-0.5) + bias) @ v
        else:
            sq, sk, sv = self.tensors[f"{name}.product.scales"]
            q, k, v = (
                np.clip(np.rint(a / s), -127, 127).astype(np.int64)
                for a, s in ((q, sq), (k, sk), (v, sv))
            )
            constant = F32(float(sq) * float(sk) * width**-0.5)
            scores = (q @ k.swapaxes(-1, -2)).astype(F32) * constant
            scores = scores + bias
            e = np.rint(np.exp(scores - scores.max(-1, keepdims=True)) * 255).astype(np.int64)
            y = (e @ v).astype(F32) / e.sum(-1, keepdims=True).astype(F32) * sv
        y = self.norm(f"{name}.norm", y.transpose(0, 2, 1, 3).reshape(b, t, -1))
        return self.linear(f"{name}.proj", y)

    def query_pool(self, x: Array) -> Array:
        query = self.tensors["attn_pool.query"]
        (b, t, width), heads = x.shape, len(query)
        kv = self.linear("attn_pool.kv", x).reshape(b, t, 2, heads, -1).transpose(2, 0, 3, 1, 4)
        scores = query[:, None] @ kv[0].swapaxes(-1, -2) * F32((width // heads) ** -0.5)
        y = (self.softmax(scores) @ kv[1]).transpose(0, 2, 1, 3).reshape(b, width)
        y = self.linear("attn_pool.proj", y)
        h = self.linear("attn_pool.mlp.fc1", self.norm("attn_pool.norm", y))
        return y + self.linear("attn_pool.mlp.fc2", self.activate(h, "pool_activation"))

    def activate(self, h: Array, kind: str = "activation") -> Array:
        if self.arch[kind] == "silu":
            return h / (1 + np.exp(-h))
        if self.arch[kind] == "quick_gelu":
            return h / (1 + np.exp(F32(-1.702) * h))
        if self.arch[kind] == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (h + 0.044715 * h.astype(np.float64) ** 3)
            return (0.5 * h * (1 + np.tanh(inner))).astype(F32)
        phi = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
        return (h * phi(h)).astype(F32)

    def mlp(self, name: str, x: Array) -> Array:
        h = self.linear(f"{name}.fc1", x)
        if self.arch["gated_mlp"]:
            gate, value = np.split(h, 2, axis=-1)
            h = self.activate(gate) * value
        else:
            h = self.activate(h)
        return self.linear(f"{name}.fc2", self.norm(f"{name}.norm", h))

    def __call__(self, pixels: Array) -> Array:
        """Logits of uint8 images ``[B, C, H, W]``."""
        (ph, pw), (height, width) = self.arch["patch_size"], self.arch["image_size"]
        patches = [
            pixels[:, :, y : y + ph, x : x + pw].reshape(len(pixels), -1)
            for y in range(0, height - ph + 1, ph)
            for x in range(0, width - pw + 1, pw)
        ]
        values = np.stack(patches, 1).astype(F32) / F32(255)
        x = self.norm("patch_norm", self.linear("patch_embed", values)) + self.tensors["pos_embed"]
        prefix = np.broadcast_to(self.tensors["prefix"], (len(x), *self.tensors["prefix"].shape))
        x = self.norm("norm_pre", np.concatenate([prefix, x], 1))
        for i in range(self.arch["depth"]):
            x = x + self.attention(f"blocks.{i}.attn", self.norm(f"blocks.{i}.norm1", x))
            x = x + self.mlp(f"blocks.{i}.mlp", self.norm(f"blocks.{i}.norm2", x))
        x = self.norm("norm", x)
        start = 0 if self.arch["pool_includes_prefix"] else self.arch["num_prefix_tokens"]
        pooled = {
            "token": lambda: x[:, 0],
            "distilled": lambda: x[:, :2].reshape(len(x), -1),
            "avg": lambda: x[:, start:].mean(1),
            "map": lambda: self.query_pool(x[:, start:]),
        }[self.arch["pool"]]()
        return self.linear("head", self.norm("fc_norm", pooled))


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
    found = DocumentedReader(tmp_path / "out")(pixels.numpy())
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


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


def test_normalisation_is_folded_into_the_patch_embedding(
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
