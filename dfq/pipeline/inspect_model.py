"""Description of a model: architecture, support by dfq, and size of its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq.errors import UnsupportedModelError
from dfq.quantization.model import QuantizedViT
from dfq.recipe import QuantizationSettings
from dfq.vit.architecture import Architecture, Preprocessing, to_json
from dfq.vit.describe import describe
from dfq.vit.load import Structure, load_structure

BITS = (8, 4)
"""Bits of the weights for which the size of a checkpoint is estimated."""


def inspect_model(name: str, weights: str | Path | None, **options: Any) -> dict[str, Any]:
    """Describe a model by name, as JSON types.

    Raises:
        UnknownModelError, WeightsError, SettingError: see :func:`dfq.load_model`.
    """
    structure = load_structure(name, weights, **options)
    reason, arch = None, None
    try:
        arch = describe(structure.model, name)
    except UnsupportedModelError as error:
        reason = error.reason
    return {
        "kind": "model",
        "model": name,
        "timm_name": structure.timm_name,
        "family": type(structure.model).__module__.rpartition(".")[2],
        "supported": arch is not None,
        "reason": reason,
        "parameters": _parameters(structure.model),
        **({} if arch is None else _shape(arch, structure)),
        "weights": None if weights is None else str(weights),
        "preprocessing": preprocessing_facts(structure.preprocessing),
        "architecture": None if arch is None else to_json(arch),
    }


def _shape(arch: Architecture, structure: Structure) -> dict[str, Any]:
    sizes = {f"w{bits}a8": _checkpoint_bytes(arch, structure.preprocessing, bits) for bits in BITS}
    return {
        "image_size": list(arch.image_size),
        "patch_size": list(arch.patch_size),
        "grid": [arch.grid.rows, arch.grid.columns],
        "width": arch.embed_dim,
        "depth": arch.depth,
        "heads": arch.num_heads,
        "classes": arch.num_classes,
        "bytes": {"float": 4 * _parameters(structure.model), **sizes},
    }


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _checkpoint_bytes(arch: Architecture, preprocessing: Preprocessing, bits: int) -> int:
    """Return the size of the tensors of a checkpoint with default settings, in bytes."""
    with torch.device("meta"):
        model = QuantizedViT(arch, QuantizationSettings(bits=bits), preprocessing)
    tensors = model.state_dict().values()
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


def preprocessing_facts(prepared: Preprocessing) -> dict[str, Any]:
    """Return the preprocessing as JSON types, with its input range."""
    return {**to_json(prepared), "input_range": list(prepared.input_range)}
