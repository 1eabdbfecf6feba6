"""How much of each layer's output quantization leaves: signal-to-quantization-noise ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.quantization.layers import IntegerLinear
from dfq.quantization.model import QuantizedViT
from dfq.quantization.scheme import Scheme, layers
from dfq.results.values import LayerNoise
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import ViT

CEILING = 150.0
"""Reported where nothing is lost, in decibels; float32 itself is not better."""

POOR = 15.0
"""Signal-to-quantization-noise ratio in decibels below which a layer is worth a warning: noise is
then more than a sixth of the output.  The worst layers of a trained ViT-S have 24 dB at W4A8 and 25
at W8A8."""

NAMED = 3
"""The worst layers that a warning names."""


class _Energies:
    """Sums of squares of a layer's output and of its three errors."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = [0.0, 0.0, 0.0]

    def add(self, expected: Tensor, found: list[Tensor]) -> None:
        self.signal += float(expected.square().sum(dtype=torch.float64))
        for i, y in enumerate(found):
            self.noise[i] += float((y - expected).square().sum(dtype=torch.float64))

    def ratios(self) -> list[float]:
        return [_decibels(self.signal, noise) for noise in self.noise]


def _decibels(signal: float, noise: float) -> float:
    if noise <= signal * 10 ** (-CEILING / 10):
        return CEILING
    return 10 * math.log10(signal / noise) if signal else -CEILING


@torch.no_grad()
def layer_noise(
    vit: ViT, quantized: QuantizedViT, batches: Iterable[SparseImages]
) -> list[LayerNoise]:
    """Measure every quantized layer on sparse images that pass through the float model."""
    energies = {name: _Energies() for name in layers(vit.arch)}
    handles = [
        vit.get_submodule(name).register_forward_pre_hook(
            _hook(cast(IntegerLinear, quantized.get_submodule(name)), energies[name])
        )
        for name in energies
    ]
    preprocessing = quantized.preprocessing
    try:
        for batch in batches:
            moved = batch.to(vit.prefix.device)
            x = pixels_to_input(moved.patches, preprocessing, vit.arch.grid)
            vit.forward_sparse(x, moved.positions)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerNoise(name, *e.ratios()) for name, e in energies.items()]


_ADVICE = {
    "few bits": "Give their weights 8 bits (--bits 8, or [layers] in a recipe).",
    "reduced range": "Set reduce_range = false in a recipe if the processor has VNNI.",
    "input": "For a noisy input keep equalize above 0, calibrate on other images or, at proj and "
    "fc2, set observer to mse in a recipe.",
}


def poor_layers(noise: list[LayerNoise], scheme: Scheme) -> list[str]:
    """A warning that names the worst layers whose ratio is below :data:`POOR`, with what to do.

    None where every layer's ratio is above it.
    """
    poor = sorted((n for n in noise if n.both < POOR), key=lambda n: n.both)
    if not poor:
        return []
    named = ", ".join(f"{n.name} ({n.both:.1f} dB)" for n in poor[:NAMED])
    more = f" and {len(poor) - NAMED} more" if len(poor) > NAMED else ""
    causes = {_cause(n, scheme) for n in poor}
    advice = " ".join(text for cause, text in _ADVICE.items() if cause in causes)
    return [
        f"The signal-to-quantization-noise ratio is below {POOR:g} dB in {named}{more}: much of "
        f"their output is noise. {advice} `dfq inspect CHECKPOINT --layers` lists every layer."
    ]


def _cause(noise: LayerNoise, scheme: Scheme) -> str:
    if noise.activations < noise.weights:
        return "input"
    return "few bits" if scheme.for_layer(noise.name).bits < 8 else "reduced range"


def _hook(target: IntegerLinear, energies: _Energies) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        linear = cast(nn.Linear, module)
        x = inputs[0].float()
        rounded = target.round_input(x)
        weight = target.dequantized()
        found = [
            F.linear(target.to_domain(x), weight, target.bias),
            F.linear(target.from_domain(rounded), linear.weight, linear.bias),
            F.linear(rounded, weight, target.bias),
        ]
        energies.add(F.linear(x, linear.weight, linear.bias), found)

    return hook
