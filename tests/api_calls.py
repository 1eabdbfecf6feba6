"""Calls of the public functions on a small model, that take little time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.results.values import QuantizeResult

FAST: dict[str, Any] = {"iterations": 4, "stages": 2, "threads": 1}


def quantize(
    model: VisionTransformer | dfq.LoadedModel, out: Path, **changes: Any
) -> QuantizeResult:
    args: dict[str, Any] = {"images": 4, "settings": {"inversion": FAST}, "out": out}
    return dfq.quantize(model, **{**args, **changes})


@pytest.fixture(scope="session")
def api_model() -> VisionTransformer:
    return make_vit()


@pytest.fixture(scope="session")
def api_checkpoint(api_model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    quantize(api_model, root / "w8a8", cache=root / "cache")
    return root / "w8a8"


def hopeless(tmp_path: Path) -> Path:
    """Images with labels that the tiny model finds the least likely."""
    x = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    model = dfq.load_model(make_vit())
    p = model.preprocessing
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor(p.mean)[:, None, None], torch.tensor(p.std)[:, None, None]
    worst = model.vit((pixels - mean) / std).argmin(-1)
    np.savez(tmp_path / "wrong.npz", x=x, y=worst.numpy())
    return tmp_path / "wrong.npz"
