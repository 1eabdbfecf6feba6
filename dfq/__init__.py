"""dfq: data-free quantization of vision transformers.

A pretrained timm ViT goes in, a W8A8 or W4A8 checkpoint comes out, and no image of
anybody's is needed: the calibration images are inverted from the model itself.
Importing dfq only defines names; PyTorch and timm load when one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dfq.benchmarking.compare import benchmark
    from dfq.cache import CacheEntry, list_cache, remove_cached, verify_cache
    from dfq.checkpoint import load
    from dfq.dataset import SparseImageDataset
    from dfq.distillation.distill import distill
    from dfq.errors import DfqError, GateError, RunError, UsageError
    from dfq.evaluation import evaluate
    from dfq.exporting.formats import export
    from dfq.inspection import DoctorReport, ModelEntry, doctor, inspect, models
    from dfq.pictures import preview
    from dfq.pipeline import invert, quantize
    from dfq.quantization.coverage import fractal_noise
    from dfq.quantization.model import QuantizedViT
    from dfq.recipe import (
        DistillationSettings,
        InversionSettings,
        QuantizationSettings,
        Recipe,
        load_recipe,
    )
    from dfq.results import (
        BenchmarkResult,
        DistillResult,
        EvaluateResult,
        ExportResult,
        InvertResult,
        QuantizeResult,
    )
    from dfq.sparse import SparseImages
    from dfq.vit.load import LoadedModel, load_model
    from dfq.writing import write_dataset

_HOMES = {
    "BenchmarkResult": "dfq.results",
    "CacheEntry": "dfq.cache",
    "DfqError": "dfq.errors",
    "DistillResult": "dfq.results",
    "DistillationSettings": "dfq.recipe",
    "DoctorReport": "dfq.inspection",
    "EvaluateResult": "dfq.results",
    "ExportResult": "dfq.results",
    "GateError": "dfq.errors",
    "InversionSettings": "dfq.recipe",
    "InvertResult": "dfq.results",
    "LoadedModel": "dfq.vit.load",
    "ModelEntry": "dfq.inspection",
    "QuantizationSettings": "dfq.recipe",
    "QuantizeResult": "dfq.results",
    "QuantizedViT": "dfq.quantization.model",
    "Recipe": "dfq.recipe",
    "RunError": "dfq.errors",
    "SparseImageDataset": "dfq.dataset",
    "SparseImages": "dfq.sparse",
    "UsageError": "dfq.errors",
    "benchmark": "dfq.benchmarking.compare",
    "distill": "dfq.distillation.distill",
    "doctor": "dfq.inspection",
    "evaluate": "dfq.evaluation",
    "export": "dfq.exporting.formats",
    "fractal_noise": "dfq.quantization.coverage",
    "inspect": "dfq.inspection",
    "invert": "dfq.pipeline",
    "list_cache": "dfq.cache",
    "load": "dfq.checkpoint",
    "load_model": "dfq.vit.load",
    "load_recipe": "dfq.recipe",
    "models": "dfq.inspection",
    "preview": "dfq.pictures",
    "quantize": "dfq.pipeline",
    "remove_cached": "dfq.cache",
    "verify_cache": "dfq.cache",
    "write_dataset": "dfq.writing",
}

__all__ = [
    "BenchmarkResult",
    "CacheEntry",
    "DfqError",
    "DistillResult",
    "DistillationSettings",
    "DoctorReport",
    "EvaluateResult",
    "ExportResult",
    "GateError",
    "InversionSettings",
    "InvertResult",
    "LoadedModel",
    "ModelEntry",
    "QuantizationSettings",
    "QuantizeResult",
    "QuantizedViT",
    "Recipe",
    "RunError",
    "SparseImageDataset",
    "SparseImages",
    "UsageError",
    "__version__",
    "benchmark",
    "distill",
    "doctor",
    "evaluate",
    "export",
    "fractal_noise",
    "inspect",
    "invert",
    "list_cache",
    "load",
    "load_model",
    "load_recipe",
    "models",
    "preview",
    "quantize",
    "remove_cached",
    "verify_cache",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dfq' has no attribute {name!r}")
    from dfq.process_state import fresh_state

    with fresh_state():  # modules make tensors and give warnings as they load
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
