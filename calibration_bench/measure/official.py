"""Official code of SMI (github.com/Egg-Hu/SMI, arXiv 2510.27186), run unchanged.

A checkout is imported and called.  Its environment is patched in memory: ``.cuda()`` stays on the
CPU if there is no GPU, data loaders start no processes, and progress bars record times.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import random
import sys
import tempfile
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from calibration_bench.measure.measure import Trace
from calibration_bench.measure.methods import Stage, random_module, stages
from dfq import InversionSettings
from dfq.errors import SettingError

PACKAGES = ("utils", "synthesis", "quantization")
"""Top-level names of the checkout's modules."""

FILES = ("synthesis/smi.py", "synthesis/_utils.py", "utils/build_model.py", "utils/data_utils.py")
"""Files of the checkout that are run."""

SIDE, PATCH = 224, 16
"""Image and patch size in pixels of its examples, the only ones that are measured."""

METHODS = ("dmi", "smi")
TV, STEP = 1e-4, 0.25
"""Weight of the total variation and learning rate of its test_quant.py."""


def code(checkout: Path) -> str:
    """Return the SHA-256 (first 16 hex digits) over :data:`FILES`.

    Raises:
        SettingError: the directory is not a checkout.
    """
    digest = hashlib.sha256()
    for name in FILES:
        if not (checkout / name).is_file():
            raise SettingError(
                f"--official {str(checkout)!r} is not a checkout of Egg-Hu/SMI: it has no {name}."
            )
        digest.update((checkout / name).read_bytes())
    return digest.hexdigest()[:16]


class Official:
    """Checkout with a randomly initialized teacher."""

    def __init__(self, checkout: Path, model: str, seed: int, batch: int, device: str) -> None:
        code(checkout)
        self.model, self.seed, self.batch, self.device = model, seed, batch, device
        with _imported(checkout):
            self.smi: Any = importlib.import_module("synthesis.smi")
            self.build: Any = importlib.import_module("utils.build_model")
            self.data: Any = importlib.import_module("utils.data_utils")
        self.teacher = self._teacher()

    def _teacher(self) -> nn.Module:
        """Build a timm model as its ``build_model`` does."""
        module = random_module(self.model, self.seed)
        timm = types.SimpleNamespace(create_model=lambda *_, **__: module)
        with _surroundings(self.device), mock.patch.object(self.build, "timm", timm):
            teacher: nn.Module = self.build.build_model(self.model, Pretrained=False)
        return teacher

    def stages(self, settings: InversionSettings) -> list[Stage]:
        """Return its stages; it rounds the number of live patches down at each pruning."""
        live, parts = (SIDE // PATCH) ** 2, []
        for stage in stages(settings, live):
            parts.append(Stage(live, stage.length))
            live = int(live * (1.0 - settings.prune_share))
        return parts

    def run(self, settings: InversionSettings, *, frozen: bool) -> Trace:
        """Time one call of its ``SMI.synthesize`` for a batch of images.

        ``frozen``: no gradients for the teacher's weights.
        """
        self.teacher.requires_grad_(not frozen)
        lengths = [stage.length for stage in stages(settings, (SIDE // PATCH) ** 2)]
        moments: list[float] = []
        with tempfile.TemporaryDirectory() as directory, _surroundings(self.device):
            synthesizer = self._synthesizer(settings, directory)
            torch.manual_seed(settings.seed)
            random.seed(settings.seed)
            with mock.patch.object(self.smi, "tqdm", _clock(moments)):
                moments.append(time.perf_counter())
                synthesizer.synthesize(**_pruning(settings, lengths))
                moments.append(time.perf_counter())
        return Trace.of(moments, lengths)

    def _synthesizer(self, settings: InversionSettings, directory: str) -> Any:
        normalizer = self.data.Normalizer(**self.data.NORMALIZE_DICT["imagenet"])
        return self.smi.SMI(
            teacher=self.teacher,
            teacher_name=self.model,
            student=nn.Identity(),
            num_classes=1000,
            img_shape=(3, SIDE, SIDE),
            patch_size=PATCH,
            iterations=settings.iterations,
            lr_g=STEP,
            synthesis_batch_size=self.batch,
            sample_batch_size=self.batch,
            tv2=TV,
            save_dir=directory,
            normalizer=normalizer,
            device=torch.device(self.device),
        )


def _pruning(settings: InversionSettings, lengths: list[int]) -> dict[str, Any]:
    """Return arguments of ``synthesize``; without pruning those of its README."""
    if settings.method == "dmi":
        at, ratio = [-1], [0.0]
    else:
        if 0 in lengths:
            raise SettingError(
                f"{settings.iterations} iterations are too few for the stages of SMI; give more."
            )
        at = [sum(lengths[:k]) for k in range(1, len(lengths))]
        ratio = [settings.prune_share] * len(at)
    return {"num_patches": 1 + (SIDE // PATCH) ** 2, "prune_it": at, "prune_ratio": ratio}


def _clock(moments: list[float]) -> Any:
    """Return a replacement of ``tqdm`` that records the time after each iteration."""

    def tqdm(iterable: Iterable[int]) -> Iterator[int]:
        for item in iterable:
            yield item
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    return tqdm


@contextlib.contextmanager
def _imported(checkout: Path) -> Iterator[None]:
    """Make the checkout importable inside the block."""
    before = _taken()
    stand_ins = _stand_ins()
    try:
        with (
            mock.patch.object(sys, "path", [str(checkout), *sys.path]),
            mock.patch.object(sys, "dont_write_bytecode", True),
        ):
            yield
    finally:
        _taken()
        sys.modules.update(before)
        for name in stand_ins:
            del sys.modules[name]


def _taken() -> dict[str, types.ModuleType]:
    """Remove modules with the checkout's names from ``sys.modules`` and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


def _stand_ins() -> list[str]:
    """Add empty modules for unused imports of the checkout that are not installed."""
    missing = []
    for package, parts in (("torchvision", ("transforms", "datasets")), ("tqdm", ("tqdm",))):
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
            missing.append(package)
            for part in parts:
                name = f"{package}.{part}"
                sys.modules[name] = types.ModuleType(name)
                setattr(sys.modules[package], part, sys.modules[name])
                missing.append(name)
    return missing


@contextlib.contextmanager
def _surroundings(device: str) -> Iterator[None]:
    """Disable ``.cuda()`` on other devices, and processes of data loaders."""
    loader = torch.utils.data.DataLoader

    def here(*args: Any, **given: Any) -> Any:
        return loader(*args, **{**given, "num_workers": 0, "pin_memory": False})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.utils.data, "DataLoader", here))
        if torch.device(device).type == "cpu":
            for kind in (nn.Module, torch.Tensor):
                stack.enter_context(mock.patch.object(kind, "cuda", lambda self, *_: self))
        yield
