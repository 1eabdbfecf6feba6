"""The official code of SMI (github.com/Egg-Hu/SMI, arXiv 2510.27186), run as it is.

A checkout is imported and called; nothing in it is changed.  What it expects of its
surroundings is put in place in memory: ``.cuda()`` stays on the CPU where there is no
GPU, loaders start no processes, progress bars become a clock.
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
"""Names that a checkout takes at the top level."""

FILES = ("synthesis/smi.py", "synthesis/_utils.py", "utils/build_model.py", "utils/data_utils.py")
"""What is run of it."""

SIDE, PATCH = 224, 16
"""The only input and patch size in pixels that is measured, those of its examples."""

METHODS = ("dmi", "smi")
TV, STEP = 1e-4, 0.25
"""Weight of the total variation and step size, as its test_quant.py has them."""


def code(checkout: Path) -> str:
    """SHA-256 (first 16 hex digits) over the files that are run.

    Raises:
        SettingError: the directory is no checkout.
    """
    digest = hashlib.sha256()
    for name in FILES:
        if not (checkout / name).is_file():
            raise SettingError(f"--official {str(checkout)!r} is no checkout of SMI: no {name}.")
        digest.update((checkout / name).read_bytes())
    return digest.hexdigest()[:16]


class Official:
    """A checkout with a randomly initialized teacher."""

    def __init__(self, checkout: Path, model: str, seed: int, batch: int, device: str) -> None:
        code(checkout)
        self.model, self.seed, self.batch, self.device = model, seed, batch, device
        with _imported(checkout):
            self.smi: Any = importlib.import_module("synthesis.smi")
            self.build: Any = importlib.import_module("utils.build_model")
            self.data: Any = importlib.import_module("utils.data_utils")
        self.teacher = self._teacher()

    def _teacher(self) -> nn.Module:
        """What its ``build_model`` makes of a timm model."""
        module = random_module(self.model, self.seed)
        timm = types.SimpleNamespace(create_model=lambda *_, **__: module)
        with _surroundings(self.device), mock.patch.object(self.build, "timm", timm):
            teacher: nn.Module = self.build.build_model(self.model, Pretrained=False)
        return teacher

    def stages(self, settings: InversionSettings) -> list[Stage]:
        """Its stages: it rounds the live patches down at each pruning."""
        live, found = (SIDE // PATCH) ** 2, []
        for stage in stages(settings, live):
            found.append(Stage(live, stage.length))
            live = int(live * (1.0 - settings.prune_share))
        return found

    def run(self, settings: InversionSettings, *, frozen: bool) -> Trace:
        """Time one call of its ``SMI.synthesize``, a batch of images.

        With ``frozen`` the teacher's weights take no gradients.
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
    """Arguments of ``synthesize``; without pruning they are those of its README."""
    if settings.method == "dmi":
        at, ratio = [-1], [0.0]
    else:
        if 0 in lengths:
            raise SettingError(f"{settings.iterations} iterations are too few for SMI's stages.")
        at = [sum(lengths[:k]) for k in range(1, len(lengths))]
        ratio = [settings.prune_share] * len(at)
    return {"num_patches": 1 + (SIDE // PATCH) ** 2, "prune_it": at, "prune_ratio": ratio}


def _clock(moments: list[float]) -> Any:
    """In the place of ``tqdm``: notes when each iteration is over."""

    def tqdm(iterable: Iterable[int]) -> Iterator[int]:
        for item in iterable:
            yield item
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    return tqdm


@contextlib.contextmanager
def _imported(checkout: Path) -> Iterator[None]:
    """The checkout's packages can be imported; afterwards all is as it was before."""
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
    """Take modules of the checkout's names out of ``sys.modules``."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


def _stand_ins() -> list[str]:
    """Empty modules for what the checkout imports, is not installed, and is not used."""
    found = []
    for package, parts in (("torchvision", ("transforms", "datasets")), ("tqdm", ("tqdm",))):
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
            found.append(package)
            for part in parts:
                name = f"{package}.{part}"
                sys.modules[name] = types.ModuleType(name)
                setattr(sys.modules[package], part, sys.modules[name])
                found.append(name)
    return found


@contextlib.contextmanager
def _surroundings(device: str) -> Iterator[None]:
    """No GPU is asked for where none is used, and loaders start no processes."""
    loader = torch.utils.data.DataLoader

    def here(*args: Any, **given: Any) -> Any:
        return loader(*args, **{**given, "num_workers": 0, "pin_memory": False})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.utils.data, "DataLoader", here))
        if torch.device(device).type == "cpu":
            for kind in (nn.Module, torch.Tensor):
                stack.enter_context(mock.patch.object(kind, "cuda", lambda self, *_: self))
        yield
