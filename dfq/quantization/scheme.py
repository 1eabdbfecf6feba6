"""Quantization schemes such as W4A8, resolved for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from dfq.errors import SettingError, nearest
from dfq.recipe import LayerSettings, Observer, QuantizationSettings, Rounding
from dfq.runtime.qtype import INT8, UINT8, QType
from dfq.vit import Architecture

EDGE_LAYERS = ("patch_embed", "head")
"""First and last layer, which keep 8 bits unless a recipe names them."""

BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

POOL_LAYERS = ("kv", "proj", "mlp.fc1", "mlp.fc2")
"""Linear layers of attention pooling."""

ATTENTION_INPUTS = ("attn.q", "attn.k", "attn.v")
"""Inputs of attention that are quantized if ``attention = "int8"``; the softmax's output needs no
calibration."""

PRODUCT_BITS = {False: 8, True: 7}
"""Bits of the weights that the kernel multiplies, by ``reduce_range``."""


@dataclass(frozen=True)
class LayerScheme:
    """Quantization scheme of one linear layer.

    ``bits``: bits of a weight in the checkpoint.  ``weight``: integer type that weights are rounded
    to; with ``reduce_range``, 8-bit weights are rounded to 7 bits.  ``group``: number of inputs
    that share an integer scale of at most ``largest_group_scale``, or 0 for scales per channel
    alone.
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
        """Whether rounding uses second moments of the input, which 8-bit weights do not need."""
        return self.rounding == "gptq" and self.bits < 8


class Scheme:
    """Quantization scheme of a model."""

    def __init__(self, settings: QuantizationSettings) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """Name such as ``w4a8``; ``w4a8-mixed`` if the recipe has exceptions by layer,
        ``w4a8-symmetric`` with symmetric activations."""
        settings = self.settings
        mixed = "-mixed" if settings.layers else ""
        symmetric = "-symmetric" if self.symmetric_activations else ""
        return f"w{settings.bits}a{settings.input_bits}{mixed}{symmetric}"

    @property
    def symmetric_activations(self) -> bool:
        """Whether inputs of layers but the patch embedding are signed, with zero point 0."""
        return self.settings.activations == "symmetric"

    @property
    def integer_attention(self) -> bool:
        """Whether attention multiplies 8-bit integers."""
        return self.settings.attention == "int8"

    def for_layer(self, layer: str) -> LayerScheme:
        """Return the scheme of a linear layer; the last matching exception wins."""
        settings, edge = self.settings, layer in EDGE_LAYERS
        layer_settings = LayerSettings(
            bits=8 if edge else settings.bits,
            input_bits=8 if edge else settings.input_bits,
            group=settings.group,
            rounding=settings.rounding,
            observer=settings.observer,
        )
        for pattern, exception in settings.layers.items():
            if fnmatchcase(layer, pattern):
                layer_settings = exception.over(layer_settings)
        return self._complete(layer, layer_settings)

    def _complete(self, layer: str, settings: LayerSettings) -> LayerScheme:
        bits = settings.bits or 8
        product_bits = PRODUCT_BITS[self.settings.reduce_range]
        largest = 1 << max(0, product_bits - bits)
        inputs = QType(settings.input_bits or 8, signed=self.symmetric_activations)
        weight = QType(min(bits, product_bits), signed=True, symmetric=bits == 8)
        return LayerScheme(
            bits=bits,
            weight=weight,
            group=(settings.group or 0) if largest > 1 else 0,
            largest_group_scale=largest,
            rounding=settings.rounding or "nearest",
            input=UINT8 if layer == "patch_embed" else inputs,
            observer=settings.observer or "minmax",
        )

    def activation_qtype(self, name: str) -> QType:
        """Return the integer type of an activation: a layer's input, or q, k or v."""
        return INT8 if name.endswith(ATTENTION_INPUTS) else self.for_layer(name).input

    def activation_observer(self, name: str) -> Observer:
        """Return the observer of an activation."""
        attention = name.endswith(ATTENTION_INPUTS)
        return self.settings.observer if attention else self.for_layer(name).observer

    def check_layers(self, arch: Architecture) -> None:
        """Raise :class:`SettingError` if an exception by layer matches no layer of a model."""
        known = layers(arch)
        for pattern in self.settings.layers:
            if not any(fnmatchcase(layer, pattern) for layer in known):
                raise SettingError(
                    f"layers has the pattern {pattern!r}, which matches no layer. Layers are "
                    f"{', '.join(known[:5])}, ..., {known[-1]}.{nearest(pattern, known)}"
                )


def layers(arch: Architecture) -> list[str]:
    """Return the names of all linear layers, in the order of the forward pass."""
    blocks = [f"blocks.{i}.{layer}" for i in range(arch.depth) for layer in BLOCK_LAYERS]
    pool = [f"attn_pool.{layer}" for layer in POOL_LAYERS if arch.pool == "map"]
    return ["patch_embed", *blocks, *pool, *(["head"] if arch.num_classes else [])]


def calibrated_activations(arch: Architecture, scheme: Scheme) -> list[str]:
    """Return the names of the activations that calibration observes.

    A layer's name stands for its input.  The patch embedding is left out: the range of its input,
    pixels, is known.
    """
    names = [layer for layer in layers(arch) if layer != "patch_embed"]
    if scheme.integer_attention:
        names += [f"blocks.{i}.{name}" for i in range(arch.depth) for name in ATTENTION_INPUTS]
    return names
