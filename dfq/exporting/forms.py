"""Conversion of a quantized model back to a plain :class:`dfq.vit.ViT`, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from dfq.quantization.layers import IntegerLinear, IntegerPatchEmbed
from dfq.quantization.model import QuantizedViT
from dfq.quantization.scheme import layers
from dfq.vit import ViT


def integer_layers(model: QuantizedViT) -> dict[str, IntegerLinear]:
    """Return all linear layers by name, in the order of the forward pass."""
    return {n: cast(IntegerLinear, model.get_submodule(n)) for n in layers(model.arch)}


def with_layers(
    model: QuantizedViT, make: Callable[[IntegerLinear], nn.Module], device: str = "cpu"
) -> ViT:
    """Return a float32 ViT in which ``make(layer)`` replaces each linear layer."""
    with torch.device("meta"):
        vit = ViT(model.arch)
    for name, layer in integer_layers(model).items():
        vit.set_submodule(name, make(layer))
    kept = model.state_dict()
    own = {k: v for k, v in vit.state_dict().items() if v.is_meta}
    vit.load_state_dict({k: kept[k].detach().clone() for k in own}, strict=False, assign=True)
    return vit.to(device).eval().requires_grad_(False)


def dequantized_linear(layer: IntegerLinear) -> nn.Linear:
    """Return the float layer with dequantized weights ``[out, in]``."""
    weight, bias = layer.dequantized(), layer.bias.clone()
    if isinstance(layer, IntegerPatchEmbed):
        bias = bias + weight @ layer.mean
        weight = weight * layer.std
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return linear


def dequantized(model: QuantizedViT) -> ViT:
    """Return the float model with dequantized weights; activations are not quantized."""
    return with_layers(model, dequantized_linear)
