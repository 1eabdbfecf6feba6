"""What W8A8 and W4A8 mean: which layer keeps how many bits."""

from __future__ import annotations

from dfq.recipe import QuantizationSettings
from dfq.vit import Architecture

EDGE_LAYERS = ("patch_embed", "head")
"""The first and the last layer, whose weights keep 8 bits in every scheme."""

BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

POOL_LAYERS = ("kv", "proj", "mlp.fc1", "mlp.fc2")
"""Linear layers of attention pooling, where a model has it."""

ATTENTION_SITES = ("attn.q", "attn.k", "attn.v")
"""What the attention products take with a range from calibration if ``attention = "int8"``; the
softmax's range is known."""


def scheme_name(settings: QuantizationSettings) -> str:
    """``w8a8`` or ``w4a8``."""
    return f"w{settings.bits}a8"


def layers(arch: Architecture) -> list[str]:
    """Names of all linear layers, in the order of the forward pass."""
    blocks = [f"blocks.{i}.{layer}" for i in range(arch.depth) for layer in BLOCK_LAYERS]
    pool = [f"attn_pool.{layer}" for layer in POOL_LAYERS if arch.pool == "map"]
    return ["patch_embed", *blocks, *pool, *(["head"] if arch.num_classes else [])]


def weight_bits(layer: str, settings: QuantizationSettings) -> int:
    """Bits of a layer's weights."""
    return 8 if layer in EDGE_LAYERS else settings.bits


def range_sites(arch: Architecture, settings: QuantizationSettings) -> list[str]:
    """Where activations are quantized with a range from calibration.

    The patch embedding is not among them: its input are pixels, whose range is known.
    """
    sites = [layer for layer in layers(arch) if layer != "patch_embed"]
    if settings.attention == "int8":
        sites += [f"blocks.{i}.{site}" for i in range(arch.depth) for site in ATTENTION_SITES]
    return sites
