"""A reader of checkpoints written from docs/checkpoint-format.md with numpy alone."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_numpy

Array = np.ndarray
F32 = np.float32


class DocumentedReader:
    """Forward pass of a checkpoint, written from the specification."""

    def __init__(self, path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        assert config["format_version"] in (5, 6, 7, 8)
        self.arch, self.recipe = config["architecture"], config["recipe"]["quantization"]
        if config["format_version"] == 5:
            self.recipe = {"reduce_range": False, **self.recipe}
        self.preprocessing = config["preprocessing"]
        self.tensors = load_numpy((path / "model.safetensors").read_bytes())

    def scheme(self, name: str) -> tuple[int, int, int]:
        """Bits of the weights and of the input of a layer, and the size of its groups."""
        edge, recipe = name in ("patch_embed", "head"), self.recipe
        values = {
            "bits": 8 if edge else recipe["bits"],
            "input_bits": 8 if edge else recipe.get("input_bits", 8),
            "group": recipe["group"],
        }
        for exception in recipe.get("layers", []):
            if fnmatchcase(name, exception["pattern"]):
                values.update(exception)
        bits = values["bits"]
        group = values["group"] if bits < self.product_bits else 0
        return bits, 8 if name == "patch_embed" else values["input_bits"], group

    @property
    def product_bits(self) -> int:
        return 7 if self.recipe["reduce_range"] else 8

    def norm(self, name: str, x: Array) -> Array:
        if f"{name}.weight" not in self.tensors:
            return x
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / np.sqrt(variance + F32(self.arch["norm_eps"]))
        return normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def lowest_input(self, name: str) -> int:
        """The lowest integer of a layer's input."""
        symmetric = self.recipe.get("activations", "asymmetric") == "symmetric"
        return -(2 ** (self.scheme(name)[1] - 1)) if symmetric and name != "patch_embed" else 0

    def quantize(self, name: str, x: Array, s: Array, z: Array) -> Array:
        lowest, bits = self.lowest_input(name), self.scheme(name)[1]
        integers = np.rint(x.astype(F32) / s) + z
        return np.clip(integers, lowest, lowest + 2**bits - 1).astype(np.int64)

    @staticmethod
    def unpack(stored: Array, bits: int, inputs: int) -> Array:
        """uint8 ``[out, bytes]`` to integers ``[out, inputs]``."""
        digits = np.unpackbits(stored, axis=1, bitorder="little")[:, : inputs * bits]
        places = digits.reshape(len(stored), inputs, bits).astype(np.int64)
        values = places @ (1 << np.arange(bits))
        return np.where(values < 1 << (bits - 1), values, values - (1 << bits))

    def weight(self, name: str, inputs: int) -> Array:
        stored, (bits, _, group) = self.tensors[f"{name}.weight"], self.scheme(name)
        if bits == 8:
            assert stored.dtype == np.int8
            return stored.astype(np.int64)
        assert stored.dtype == np.uint8
        assert stored.shape[1] == math.ceil(inputs * bits / 8)
        integers = self.unpack(stored, bits, inputs)
        if group:
            integers = integers * self.tensors[f"{name}.group_scale"][:, np.arange(inputs) // group]
        return integers

    def linear(self, name: str, x: Array) -> Array:
        s, z = (self.tensors[f"{name}.input_{p}"] for p in ("scale", "zero_point"))
        sums = (self.quantize(name, x, s, z) - z) @ self.weight(name, x.shape[-1]).T
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
