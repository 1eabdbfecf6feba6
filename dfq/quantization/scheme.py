"""What a scheme such as W4A8 means, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from dfq.errors import SettingError, nearest
from dfq.recipe import LayerSettings, Observer, QuantizationSettings, Rounding
from dfq.runtime.qtype import INT8, UINT8, QType
from dfq.vit import Architecture

EDGE_LAYERS = ("patch_embed", "head")
"""The first and the last layer, which keep 8 bits unless a recipe names them."""

BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

POOL_LAYERS = ("kv", "proj", "mlp.fc1", "mlp.fc2")
"""Linear layers of attention pooling, where a model has it."""

ATTENTION_SITES = ("attn.q", "attn.k", "attn.v")
"""What the attention products take with a range from calibration if ``attention = "int8"``; the
softmax's range is known."""

PRODUCT_BITS = {False: 8, True: 7}
"""Bits of the weights as products multiply them, by ``reduce_range``."""


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is quantized.

    ``bits`` are those that a checkpoint stores a weight in, ``weight`` the integers that it is
    rounded to: with ``reduce_range`` 8 bits store integers of 7.  Runs of ``group`` inputs have an
    integer scale of at most ``largest_group_scale``; 0: none.
    """

    bits: int
    weight: QType
    group: int
    largest_group_scale: int
    rounding: Rounding
    input: QType
    observer: Observer

    @property
    def second_order(self) -> bool:
        """Whether rounding takes second moments of the input; 8 bits need none."""
        return self.rounding == "gptq" and self.bits < 8


class Scheme:
    """How each layer of a model is quantized."""

    def __init__(self, settings: QuantizationSettings) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """Such as ``w4a8``; ``w4a8-mixed`` where the recipe has exceptions by layer."""
        settings = self.settings
        return f"w{settings.bits}a{settings.input_bits}{'-mixed' if settings.layers else ''}"

    @property
    def integer_attention(self) -> bool:
        """Whether attention's products multiply integers."""
        return self.settings.attention == "int8"

    def for_layer(self, layer: str) -> LayerScheme:
        """How a linear layer is quantized; of the exceptions that match it, the last says."""
        settings, edge = self.settings, layer in EDGE_LAYERS
        said = LayerSettings(
            bits=8 if edge else settings.bits,
            input_bits=8 if edge else settings.input_bits,
            group=settings.group,
            rounding=settings.rounding,
            observer=settings.observer,
        )
        for pattern, exception in settings.layers.items():
            if fnmatchcase(layer, pattern):
                said = exception.over(said)
        return self._complete(layer, said)

    def _complete(self, layer: str, said: LayerSettings) -> LayerScheme:
        bits = said.bits or 8
        product_bits = PRODUCT_BITS[self.settings.reduce_range]
        largest = 1 << max(0, product_bits - bits)
        weight = QType(min(bits, product_bits), signed=True, symmetric=bits == 8)
        return LayerScheme(
            bits=bits,
            weight=weight,
            group=(said.group or 0) if largest > 1 else 0,
            largest_group_scale=largest,
            rounding=said.rounding or "nearest",
            input=UINT8 if layer == "patch_embed" else QType(said.input_bits or 8),
            observer=said.observer or "minmax",
        )

    def input_of(self, site: str) -> QType:
        """The integers of what is quantized at a site: a layer's input, or q, k or v."""
        return INT8 if site.endswith(ATTENTION_SITES) else self.for_layer(site).input

    def observer_of(self, site: str) -> Observer:
        """How the range of what is quantized at a site is found."""
        attention = site.endswith(ATTENTION_SITES)
        return self.settings.observer if attention else self.for_layer(site).observer

    def check_layers(self, arch: Architecture) -> None:
        """Raise :class:`SettingError` if an exception matches no layer of a model."""
        known = layers(arch)
        for pattern in self.settings.layers:
            if not any(fnmatchcase(layer, pattern) for layer in known):
                raise SettingError(
                    f"layers has the pattern {pattern!r}, which matches no layer. Layers are "
                    f"{', '.join(known[:5])}, ..., {known[-1]}.{nearest(pattern, known)}"
                )


def layers(arch: Architecture) -> list[str]:
    """Names of all linear layers, in the order of the forward pass."""
    blocks = [f"blocks.{i}.{layer}" for i in range(arch.depth) for layer in BLOCK_LAYERS]
    pool = [f"attn_pool.{layer}" for layer in POOL_LAYERS if arch.pool == "map"]
    return ["patch_embed", *blocks, *pool, *(["head"] if arch.num_classes else [])]


def range_sites(arch: Architecture, scheme: Scheme) -> list[str]:
    """Where activations are quantized with a range from calibration.

    The patch embedding is not among them: its input are pixels, whose range is known.
    """
    sites = [layer for layer in layers(arch) if layer != "patch_embed"]
    if scheme.integer_attention:
        sites += [f"blocks.{i}.{site}" for i in range(arch.depth) for site in ATTENTION_SITES]
    return sites
