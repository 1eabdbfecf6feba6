"""Shared fixtures: small models and images, and the directory of real ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# read when triton is imported, which timm does
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

# For processes that tests start: threads of more processes than cores would spin at each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import timm
import torch
from recorded_warnings import (  # noqa: F401 (hooks)
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_warning_recorded,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from dfq.vit.load import LoadedModel, load_model

pytest_plugins = [
    "api_calls",
    "callers_process",
    "command_line",
    "people_weights",
    "saved_checkpoints",
    "sparse_datasets",
]
"""Fixtures that several files of a room share."""

THREADS = 1

hypothesis.settings.register_profile("dfq", derandomize=True, deadline=None)
hypothesis.settings.load_profile("dfq")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_vit(seed: int = 0, **changes: Any) -> VisionTransformer:
    """Create a small random ViT whose activations spread like those of a trained one."""
    args: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 5,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(**{**args, **changes})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def tiny() -> VisionTransformer:
    """16x16 pixels in 3 channels, 4x4 grid of patches, 5 classes, 64 wide, 2 blocks."""
    return make_vit()


@pytest.fixture
def loaded(tiny: VisionTransformer) -> LoadedModel:
    """The small model, loaded by dfq."""
    return load_model(tiny, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of ``vit_tiny_patch16_224`` at 32 px with 5 classes, randomly initialized."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's own ``test_vit`` at 32 px with 5 classes, randomly initialized."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=32, num_classes=5)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def labeled_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 random 16x16 color images of 5 classes."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    x = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(20, dtype=np.uint8) % 5)
    return path


@pytest.fixture
def shared() -> Path:
    """Directory of real models and data; the test is skipped where it is absent."""
    path = Path(os.environ.get("DFQ_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "models").is_dir():
        pytest.skip("real models are not here; name their directory with $DFQ_SHARED")
    return path


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask that is neither the default nor that of temporary files."""
    before = os.umask(0o027)
    yield
    os.umask(before)
