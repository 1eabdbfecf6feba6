"""Signal-to-quantization-noise ratio (SQNR) of each layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.argument_names import option
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.model import QuantizedViT
from dfq.quantization.scheme import Scheme, layers
from dfq.results.values import LayerSqnr
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import ViT

MAX_SQNR = 150.0
"""Largest SQNR that is reported, in decibels; float32 itself is not better."""

LOW_SQNR = 15.0
"""SQNR in decibels below which a layer gets a warning: the noise is then more than a sixth of the
output.  The worst layers of a trained ViT-S have 24 dB at W4A8 and 25
at W8A8."""

MAX_NAMED = 3
"""Number of layers that a warning names."""


class _Energies:
    """Accumulated energies of a layer's output and of its three quantization errors."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = [0.0, 0.0, 0.0]

    def add(self, expected: Tensor, outputs: list[Tensor]) -> None:
        self.signal += float(expected.square().sum(dtype=torch.float64))
        for i, y in enumerate(outputs):
            self.noise[i] += float((y - expected).square().sum(dtype=torch.float64))

    def sqnr(self) -> list[float]:
        return [_decibels(self.signal, noise) for noise in self.noise]


def _decibels(signal: float, noise: float) -> float:
    if noise <= signal * 10 ** (-MAX_SQNR / 10):
        return MAX_SQNR
    return 10 * math.log10(signal / noise) if signal else -MAX_SQNR


@torch.no_grad()
def layer_sqnr(
    vit: ViT, quantized: QuantizedViT, batches: Iterable[SparseImages]
) -> list[LayerSqnr]:
    """Measure the SQNR of every quantized layer's output.

    Inputs are those of the float model, so errors of earlier layers do not count.
    """
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
            batch = batch.to(vit.prefix.device)
            x = pixels_to_input(batch.patches, preprocessing, vit.arch.grid)
            vit.forward_sparse(x, batch.positions)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerSqnr(name, *e.sqnr()) for name, e in energies.items()]


_ADVICE = {
    "few bits": "Give their weights 8 bits ({bits}, or [layers] in a recipe).",
    "reduced range": "Set reduce_range = false in a recipe if the processor has VNNI.",
    "input": "For a noisy input keep equalize above 0, calibrate on other images or, at proj and "
    "fc2, set observer to mse in a recipe.",
}


def low_sqnr_warnings(measured: list[LayerSqnr], scheme: Scheme) -> list[str]:
    """Return a warning about the layers with an SQNR below :data:`LOW_SQNR`, with advice.

    The list is empty if there are none.
    """
    low = sorted((n for n in measured if n.both < LOW_SQNR), key=lambda n: n.both)
    if not low:
        return []
    named = ", ".join(f"{n.name} ({n.both:.1f} dB)" for n in low[:MAX_NAMED])
    more = f" and {len(low) - MAX_NAMED} more" if len(low) > MAX_NAMED else ""
    causes = {_cause(n, scheme) for n in low}
    advice = " ".join(text for cause, text in _ADVICE.items() if cause in causes)
    advice = advice.format(bits=option("bits", 8))
    return [
        f"The signal-to-quantization-noise ratio is below {LOW_SQNR:g} dB in {named}{more}: much "
        f"of their output is noise. {advice} `dfq inspect CHECKPOINT --layers` lists every layer."
    ]


def _cause(layer: LayerSqnr, scheme: Scheme) -> str:
    if layer.activations < layer.weights:
        return "input"
    return "few bits" if scheme.for_layer(layer.name).bits < 8 else "reduced range"


def _hook(target: IntegerLinear, energies: _Energies) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        linear = cast(nn.Linear, module)
        x = inputs[0].float()
        x_quantized = target.fake_quantize_input(x)
        weight = target.dequantized()
        outputs = [
            F.linear(target.apply_affine(x), weight, target.bias),
            F.linear(target.invert_affine(x_quantized), linear.weight, linear.bias),
            F.linear(x_quantized, weight, target.bias),
        ]
        energies.add(F.linear(x, linear.weight, linear.bias), outputs)

    return hook
