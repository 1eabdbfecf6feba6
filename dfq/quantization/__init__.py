"""Post-training quantization of a ViT from a sparse-image dataset."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfq.quantization.calibration import Calibration, calibrate
    from dfq.quantization.layers import IntegerLinear
    from dfq.quantization.model import QuantizedViT, quantize_vit

__all__ = ["Calibration", "IntegerLinear", "QuantizedViT", "calibrate", "quantize_vit"]

_MODULES = {
    "Calibration": "calibration",
    "IntegerLinear": "layers",
    "QuantizedViT": "model",
    "calibrate": "calibration",
    "quantize_vit": "model",
}


def __getattr__(name: str) -> Any:
    """Load names on first use, so that opening a checkpoint does not import torch.ao."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
