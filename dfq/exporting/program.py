"""Export of the reference arithmetic as a ``torch.export`` program."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from dfq.exporting.forms import with_layers
from dfq.quantization.layers import IntegerLinear, IntegerPatchEmbed
from dfq.quantization.model import QuantizedViT
from dfq.runtime import reference
from dfq.runtime.params import LinearParams, OutputFormat
from dfq.runtime.qtype import INT8, QParams
from dfq.runtime.weights import StoredWeight
from dfq.vit import ViT

FACTS = "dfq.json"


class ReferenceLinear(nn.Module):
    """Integer layer on :mod:`dfq.runtime.reference` with float input and output.

    Weights are stored as in the checkpoint.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, layer: IntegerLinear) -> None:
        super().__init__()
        self.bits, self.group, self.in_features = layer.bits, layer.group, layer.in_features
        for name, value in layer.state_dict().items():
            if not name.startswith("input_"):
                self.register_buffer(name, value)
        self.qparams = layer.input_qparams
        self.pixels = isinstance(layer, IntegerPatchEmbed)
        if isinstance(layer, IntegerPatchEmbed):
            self.register_buffer("mean", layer.mean)
            self.register_buffer("std", layer.std)

    def forward(self, x: Tensor) -> Tensor:
        """Float32 ``[..., in]`` to ``[..., out]``."""
        if self.pixels:
            x = x * self.get_buffer("std") + self.get_buffer("mean")
        group_scale = self.get_buffer("group_scale") if self.group else None
        stored = StoredWeight(self.weight, self.bits, self.in_features, group_scale, self.group)
        params = LinearParams(stored, self.weight_scale, self.bias, self.qparams)
        quantized = reference.quantize(x, self.qparams)
        return reference.linear(quantized, params, reference.prepack(params), OutputFormat())


class ReferenceProduct(nn.Module):
    """Attention on 8-bit integers by :mod:`dfq.runtime.reference`."""

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.scales: list[float] = scales.tolist()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        pairs = zip((q, k, v), self.scales, strict=True)
        q, k, v = (reference.quantize(x, QParams(scale, 0, INT8)) for x, scale in pairs)
        scale = self.scales[0] * self.scales[1] * q.shape[-1] ** -0.5
        return reference.attention(q, k, v, scale, bias) * self.scales[2]


def reference_form(model: QuantizedViT) -> ViT:
    """Return the quantized model in plain torch operators, integer or float32."""
    vit = with_layers(model, ReferenceLinear)
    if model.scheme.integer_attention:
        for index, product in enumerate(model.attention_products()):
            vit.block(index).attn.product = ReferenceProduct(product.scales)
    return vit


@torch.no_grad()
def program_bytes(model: QuantizedViT, facts: dict[str, str]) -> bytes:
    """Return a ``.pt2`` file: normalized images float32 ``[N, C, H, W]`` to logits.

    ``torch.export.load`` reads it without dfq.
    """
    arch = model.arch
    images = torch.zeros(2, arch.in_channels, *arch.image_size)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        reference_form(model), (images,), dynamic_shapes={"images": batch}
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    return buffer.getvalue()


def is_export(path: Path) -> bool:
    """Whether a file is a program that dfq wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{FACTS}") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False
