"""Metadata of exported files."""

from __future__ import annotations

import json

from dfq._version import __version__
from dfq.checkpoint import CheckpointInfo
from dfq.quantization.scheme import Scheme, layers


def layer_bits(info: CheckpointInfo) -> set[int]:
    """Return the bits of weights that a checkpoint's layers have, exceptions included."""
    scheme = Scheme(info.recipe.quantization)
    return {scheme.for_layer(layer).bits for layer in layers(info.arch)}


def facts(info: CheckpointInfo, weights: str) -> dict[str, str]:
    """Return the metadata of a file exported from a checkpoint, as strings; lists are JSON.

    ``mean`` and ``std`` are per channel, of values in ``input_range`` ([0.0, 1.0] for pixels /
    255); ``weights`` is the type of the narrowest weights in the file.
    """
    arch, prepared, settings = info.arch, info.preprocessing, info.recipe.quantization
    narrowest = f"int{min(layer_bits(info))}"
    wider = f"{narrowest}, widened to int8" if weights == "int8" != narrowest else weights
    return {
        "dfq_version": __version__,
        "model": info.model,
        "scheme": Scheme(settings).name,
        "attention": settings.attention,
        "weights": wider,
        "classes": str(arch.num_classes),
        "channels": str(arch.in_channels),
        "image_size": json.dumps(arch.image_size),
        "mean": json.dumps(prepared.mean),
        "std": json.dumps(prepared.std),
        "input_range": json.dumps(prepared.input_range),
        "interpolation": prepared.interpolation,
        "crop_pct": json.dumps(prepared.crop_pct),
        "crop_mode": prepared.crop_mode,
    }
