"""Global states of a caller's process, and files for calls in them."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from torch.overrides import _get_current_function_mode_stack

import dfq


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def default_type(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def state() -> dict[str, Any]:
    """Return the global state that a call must not change."""
    backends: Any = torch.backends
    return {
        "dtype": torch.get_default_dtype(),
        "modes": list(map(id, _get_current_function_mode_stack())),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [
            (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
        ],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomalies": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "deterministic": torch.get_deterministic_debug_mode(),
        "products": (torch.get_float32_matmul_precision(), backends.mkldnn.matmul.fp32_precision),
        "oneDNN": backends.mkldnn.enabled,
        "attention": [
            getattr(backends.cuda, f"{name}_sdp_enabled")()
            for name in ("math", "flash", "mem_efficient", "cudnn")
        ],
        "threads": torch.get_num_threads(),
        "numpy": np.geterr(),
        "warnings": (id(warnings.filters), list(warnings.filters)),
        "random": (
            random.getstate(),
            str(np.random.get_state()),
            _torch_random(),
        ),
    }


def _torch_random() -> bytes:
    with torch._C.DisableTorchFunction():
        return bytes(torch.default_generator.get_state().numpy())


FAST: dict[str, Any] = {"images": 2, "iterations": 1, "stages": 1, "threads": 1}


@dataclasses.dataclass(frozen=True)
class Given:
    """Arguments for the calls: files, and a module in memory."""

    root: Path
    model: torch.nn.Module
    loaded: dfq.LoadedModel
    units: list[list[dfq.SparseImages]]

    @property
    def checkpoint(self) -> Path:
        return self.root / "w4a8"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def npz(self) -> Path:
        return self.root / "labeled.npz"


@pytest.fixture(scope="session")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> Given:
    root = tmp_path_factory.mktemp("given")
    model = make_vit()
    files = Given(root, model, dfq.load_model(model), [])
    dfq.invert(model, out=files.images, **FAST)
    files.units.extend(dfq.SparseImageDataset(files.images).units())
    dfq.quantize(model, bits=4, calibration=files.images, out=files.checkpoint, cache=root / "c")
    x = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(files.npz, x=x, y=np.arange(4, dtype=np.uint8))
    (root / "recipe.toml").write_text("[inversion]\nimages = 9\n")
    return files


def run_together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
