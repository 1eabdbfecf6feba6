"""Kernels that run the layers of quantized models on this machine, and why not faster ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dfq import runtime
from dfq.quantization.model import QuantizedAttention, QuantizedViT
from dfq.runtime import elementwise
from dfq.runtime.onednn import MAX_WEIGHT_WITHOUT_VNNI
from dfq.runtime.params import KernelRequirements

TORCH = "torch"
"""What runs attention in floating point."""


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of some layers on a device.

    ``layers``: their names, ``*`` for all blocks, or what they have in common; ``count``: how many
    they are, None of layers in general.  ``bits``: bits of a stored weight, ``max_weight``: largest
    magnitude of the integers that are multiplied; both None for attention.  ``backend``: the
    backend of :mod:`dfq.runtime`, or ``torch`` for attention in floating point; ``operands``: dtype
    in which it multiplies.  ``refused``: why backends that are preferred to it do not run the
    layers.
    """

    device: str
    layers: str
    count: int | None
    bits: int | None
    max_weight: int | None
    backend: str
    operands: str
    refused: dict[str, str]


KINDS = {
    "8-bit weights, reduced range (the default)": (8, MAX_WEIGHT_WITHOUT_VNNI),
    "4-bit weights, widened to 8 bits": (4, MAX_WEIGHT_WITHOUT_VNNI),
    "8-bit weights, full range": (8, 127),
    "4-bit weights, widened to the full range": (4, 127),
    "patch embedding and head, reduced range": (8, MAX_WEIGHT_WITHOUT_VNNI),
    "patch embedding and head, full range": (8, 127),
}
"""Bits and largest weights of the kinds of linear layers; ``reduce_range`` decides the range."""


def machine_devices() -> list[torch.device]:
    """Return the CPU and, where there is one, the first GPU."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def kernels_of_kinds(devices: Iterable[torch.device]) -> list[KernelChoice]:
    """Return the kernels of every kind of layer."""
    found = []
    for device in devices:
        found += [
            _linear(device, kind, None, bits, KernelRequirements(largest))
            for kind, (bits, largest) in KINDS.items()
        ]
        integer = runtime.select(device, needs=KernelRequirements(max_weight=0))
        dtype = elementwise.attention_dtype(device)
        found.append(_attention(device, "attention, float", None, TORCH, dtype))
        dtype = integer.attention_dtype(device)
        found.append(_attention(device, "attention, int8", None, integer.NAME, dtype))
    return found


def kernels_of_model(model: QuantizedViT, devices: Iterable[torch.device]) -> list[KernelChoice]:
    """Return the kernels of a model's layers; layers of the same place and kernel are one entry."""
    return [each for device in devices for each in _of_model(model, device)]


def _of_model(model: QuantizedViT, device: torch.device) -> list[KernelChoice]:
    alike: dict[tuple[object, ...], list[tuple[str, KernelRequirements]]] = {}
    for name, layer in model.linear_layers().items():
        needs = layer.requirements()
        selected = runtime.select(device, layer.backend, needs).NAME
        key = (_place(name), layer.bits, selected, tuple(runtime.refusals(device, needs)))
        alike.setdefault(key, []).append((name, needs))
    depth, found = model.arch.depth, []
    for (_, bits, *_), members in alike.items():
        names = [name for name, _ in members]
        widest = max((needs for _, needs in members), key=lambda needs: needs.max_weight)
        assert isinstance(bits, int)
        found.append(_linear(device, _title(names, depth), len(names), bits, widest))
    return [*found, *_attention_of(model, device)]


def _attention_of(model: QuantizedViT, device: torch.device) -> list[KernelChoice]:
    first = model.block(0).attn
    assert isinstance(first, QuantizedAttention)
    backend = first.product.select(device).NAME if first.product.integer else TORCH
    dtype, depth = first.product_dtype(device), model.arch.depth
    title = _title([f"blocks.{i}.attn.product" for i in range(depth)], depth)
    return [_attention(device, title, depth, backend, dtype)]


def _linear(
    device: torch.device, layers: str, count: int | None, bits: int, needs: KernelRequirements
) -> KernelChoice:
    kernels, refused = runtime.select(device, needs=needs), runtime.refusals(device, needs)
    dtype = _name(kernels.linear_dtype(device))
    return KernelChoice(
        str(device), layers, count, bits, needs.max_weight, kernels.NAME, dtype, refused
    )


def _attention(
    device: torch.device, layers: str, count: int | None, backend: str, dtype: torch.dtype
) -> KernelChoice:
    return KernelChoice(str(device), layers, count, None, None, backend, _name(dtype), {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def _place(name: str) -> str:
    """Return a layer's name with ``*`` as its block."""
    return _BLOCK.sub("blocks.*.", name)


def _title(names: list[str], depth: int) -> str:
    """Return one name for layers of the same place: ``blocks.*.attn.qkv`` if all blocks have it,
    else ``blocks.0,3.attn.qkv``."""
    blocks = [match[1] for match in map(_BLOCK.match, names) if match]
    if not blocks or len(blocks) == depth:
        return _place(names[0])
    return _BLOCK.sub(f"blocks.{','.join(blocks)}.", names[0])
