"""A small quantized model, its checkpoint, and ways to damage it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from timm.layers import QuickGELU
from torch import Tensor

from dfq.checkpoint import save_checkpoint
from dfq.inversion import Engine, plan_units
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.scheme import Scheme
from dfq.recipe import InversionSettings, QuantizationSettings, Recipe
from dfq.vit.load import LoadedModel, load_model

INVERSION = InversionSettings(iterations=4, images=8, precision="float32", threads=1)


SOURCE = {"timm_name": "some_vit", "fingerprint": "f" * 64}


def quantized(loaded: LoadedModel, settings: QuantizationSettings) -> QuantizedViT:
    engine = Engine(loaded.vit, loaded.preprocessing, INVERSION)
    units = plan_units(INVERSION, loaded.vit.arch.grid.patches)
    images = [batch for unit in units for batch in engine.run(unit)]
    calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(settings))
    return quantize_vit(loaded.vit, calibration, loaded.preprocessing, settings)


def save(path: Path, model: QuantizedViT) -> int:
    return save_checkpoint(
        path,
        model,
        name="my vit",
        recipe=Recipe(INVERSION, model.settings),
        source=SOURCE,
    )


def some_images(model: QuantizedViT, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, model.arch.in_channels, *model.arch.image_size)
    return torch.randn(shape, generator=generator)


@pytest.fixture(scope="session")
def w4a8_model() -> QuantizedViT:
    """The small model with 4-bit weights and 8-bit attention, which has tensors of all kinds."""
    loaded = load_model(make_vit(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return quantized(loaded, QuantizationSettings(bits=4, attention="int8"))


@pytest.fixture(scope="session")
def w4a8_saved(w4a8_model: QuantizedViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint, which no test changes."""
    path = tmp_path_factory.mktemp("checkpoints") / "saved"
    save(path, w4a8_model)
    return path


@pytest.fixture
def w4a8(w4a8_saved: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint, alone in its parent directory."""
    return Path(shutil.copytree(w4a8_saved, tmp_path / "place" / "checkpoint"))


VARIANTS: dict[str, dict[str, Any]] = {
    "average": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2, "global_pool": "avg"},
    "normed": {"qk_norm": True, "pre_norm": True},
    "odd": {"embed_dim": 33, "num_heads": 3, "reg_tokens": 1},
    "quick": {"act_layer": QuickGELU},
    "tanh": {"act_layer": "gelu_tanh"},
    "rectangles": {"img_size": (18, 13), "patch_size": (4, 3)},
}


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
