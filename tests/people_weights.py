"""A small model of timm's, and files of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import spread_out
from torch import Tensor

from dfq.vit.load import LoadedModel, load_model

State = dict[str, Tensor]


SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}


def timm_model(name: str = "vit_base_patch16_224", **changes: Any) -> Any:
    """A small model of a family, whose logits differ between images."""
    return spread_out(partial(timm.create_model, name, **{**SMALL, **changes}))


def load(path: Path, name: str = "vit_base_patch16_224", **options: Any) -> LoadedModel:
    """A file's weights in a small model of a family, which a folder describes as timm does."""
    shape = {k: v for k, v in SMALL.items() if k not in ("img_size", "num_classes")}
    config = {"architecture": name, "model_args": shape, "pretrained_cfg": {}}
    folder = path.parent / "described"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(f"local-dir:{folder}", weights=path, **{"img_size": 32, **options})


def images_for(model: Any, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    channels = model.patch_embed.proj.in_channels
    return torch.randn(count, channels, *model.patch_embed.img_size, generator=generator)


@torch.inference_mode()
def assert_same(loaded: LoadedModel, model: Any) -> None:
    images = images_for(model)
    expected = model(images)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(loaded.vit(images), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="session")
def timm_vit() -> Any:
    return timm_model()


@pytest.fixture
def timm_state(timm_vit: Any) -> State:
    return {key: value.clone() for key, value in timm_vit.state_dict().items()}


def under(prefix: str, rest: dict[str, Any] | None = None) -> Callable[[Any, State], Any]:
    return lambda _, state: {f"{prefix}{k}": v for k, v in state.items()} | (rest or {})
