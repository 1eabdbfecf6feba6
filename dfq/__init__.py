"""dfq: data-free quantization of vision transformers.

A pretrained timm ViT goes in, a W8A8 or W4A8 checkpoint comes out, and no image of
anybody's is needed: the calibration images are inverted from the model itself.
Importing dfq only defines names; PyTorch and timm load when one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dfq._version import __version__

if TYPE_CHECKING:
    from dfq.benchmarking.compare import benchmark
    from dfq.cache import CacheEntry
    from dfq.data.augmentation import fractal_noise
    from dfq.data.dataset import SparseImageDataset
    from dfq.data.preview import preview
    from dfq.engines.load import load
    from dfq.engines.module import EngineModel
    from dfq.errors import DfqError, GateError, RunError, UsageError
    from dfq.exporting.formats import export
    from dfq.pipeline.cached import list_cache, remove_cached, verify_cache
    from dfq.pipeline.distill import distill
    from dfq.pipeline.evaluate import evaluate
    from dfq.pipeline.inspect import DoctorReport, ModelEntry, doctor, inspect, models
    from dfq.pipeline.invert import invert
    from dfq.pipeline.quantize import quantize
    from dfq.pipeline.write_dataset import write_dataset
    from dfq.quantization.model import QuantizedViT
    from dfq.recipe import (
        DistillationSettings,
        InversionSettings,
        QuantizationSettings,
        Recipe,
        load_recipe,
    )
    from dfq.results.values import (
        BenchmarkResult,
        DistillResult,
        EvaluateResult,
        ExportResult,
        InvertResult,
        QuantizeResult,
    )
    from dfq.sparse import SparseImages
    from dfq.vit.load import LoadedModel, load_model

_MODULES = {
    "BenchmarkResult": "dfq.results.values",
    "CacheEntry": "dfq.cache",
    "DfqError": "dfq.errors",
    "DistillResult": "dfq.results.values",
    "DistillationSettings": "dfq.recipe",
    "DoctorReport": "dfq.pipeline.inspect",
    "EngineModel": "dfq.engines.module",
    "EvaluateResult": "dfq.results.values",
    "ExportResult": "dfq.results.values",
    "GateError": "dfq.errors",
    "InversionSettings": "dfq.recipe",
    "InvertResult": "dfq.results.values",
    "LoadedModel": "dfq.vit.load",
    "ModelEntry": "dfq.pipeline.inspect",
    "QuantizationSettings": "dfq.recipe",
    "QuantizeResult": "dfq.results.values",
    "QuantizedViT": "dfq.quantization.model",
    "Recipe": "dfq.recipe",
    "RunError": "dfq.errors",
    "SparseImageDataset": "dfq.data.dataset",
    "SparseImages": "dfq.sparse",
    "UsageError": "dfq.errors",
    "benchmark": "dfq.benchmarking.compare",
    "distill": "dfq.pipeline.distill",
    "doctor": "dfq.pipeline.inspect",
    "evaluate": "dfq.pipeline.evaluate",
    "export": "dfq.exporting.formats",
    "fractal_noise": "dfq.data.augmentation",
    "inspect": "dfq.pipeline.inspect",
    "invert": "dfq.pipeline.invert",
    "list_cache": "dfq.pipeline.cached",
    "load": "dfq.engines.load",
    "load_model": "dfq.vit.load",
    "load_recipe": "dfq.recipe",
    "models": "dfq.pipeline.inspect",
    "preview": "dfq.data.preview",
    "quantize": "dfq.pipeline.quantize",
    "remove_cached": "dfq.pipeline.cached",
    "verify_cache": "dfq.pipeline.cached",
    "write_dataset": "dfq.pipeline.write_dataset",
}

__all__ = [
    "BenchmarkResult",
    "CacheEntry",
    "DfqError",
    "DistillResult",
    "DistillationSettings",
    "DoctorReport",
    "EngineModel",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'dfq' has no attribute {name!r}")
    from dfq.process_state import fresh_state

    with fresh_state():  # modules make tensors and give warnings as they load
        value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
