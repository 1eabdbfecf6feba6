"""``dfq.load``: a checkpoint as a module, on PyTorch or on another runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, overload

import torch

from dfq import checkpoint as checkpoints
from dfq.arguments import checked
from dfq.device import resolve_device
from dfq.engines.inputs import random_images
from dfq.engines.module import EngineModel, open_engine
from dfq.engines.sessions import AUTO, TORCH, check_runtime, installed_engines
from dfq.engines.tuning import Choices, measure
from dfq.errors import DeviceError, DfqError, SettingError
from dfq.failures import first_line
from dfq.quantization.model import QuantizedViT
from dfq.slow import TOO_WIDE, slow_integers

MAX_BATCH = 4096


@overload
def load(
    path: str | Path,
    *,
    device: torch.device | str = ...,
    compiled: bool = ...,
    cuda_graphs: bool = ...,
    runtime: Literal["torch"],
) -> QuantizedViT: ...


@overload
def load(
    path: str | Path,
    *,
    device: torch.device | str = ...,
    compiled: bool = ...,
    cuda_graphs: bool = ...,
    runtime: str = ...,
    tune: bool = ...,
    batch: int = ...,
    cache: str | Path | None = ...,
) -> QuantizedViT | EngineModel: ...


@checked
def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    compiled: bool = False,
    cuda_graphs: bool = True,
    runtime: str = AUTO,
    tune: bool = False,
    batch: int = 1,
    cache: str | Path | None = None,
) -> QuantizedViT | EngineModel:
    """Load a checkpoint: an ordinary module that takes normalized images ``[B, C, H, W]``.

    Values are rounded to the 256 levels of the input range and clamped to it, so that random
    normal images give other logits than in the float model.

    Nothing is unpickled or downloaded.  Names, types and shapes of all tensors are
    compared with what the architecture asks for before any of them is read.

    Args:
        compiled: run what lies between the integer products through ``torch.compile``: see
            :meth:`QuantizedViT.compile`.
        cuda_graphs: on a GPU, capture the forward pass of a batch whose shape repeats as a CUDA
            graph and replay it, with the same logits; see
            :class:`dfq.runtime.graphs.GraphCache`.
        runtime: what executes the model: ``torch``, ``openvino``, ``onnxruntime``, or ``auto``,
            which is ``torch`` unless an engine was measured to be faster on this machine, by
            ``tune`` or by ``dfq benchmark --save``.  The file of an engine is written to the
            cache once.
        tune: with ``auto``, measure ``torch`` and the installed engines on random images for at
            most 3 s each, unless a record for this batch size exists, and record the result.
        batch: batch size that ``auto`` chooses and ``tune`` measures for.
        cache: cache directory; else ``$DFQ_CACHE``, else the user's.

    Raises:
        CheckpointError: the directory is no checkpoint, or its files are damaged.
        DeviceError: the device is not there, or is none of the engine's.
        ExtraError: the engine's packages are not installed.
        SettingError: ``compiled`` without a C++ compiler or with an engine; ``tune`` without
            ``auto`` or on a GPU; an engine whose products would saturate on this processor.
        OutputError: the engine's file or the record cannot be written to the cache.

    Warns where weights of the full range make this processor multiply in floating point.
    """
    model = open_checkpoint(
        path,
        device=device,
        compiled=compiled,
        runtime=runtime,
        tune=tune,
        batch=batch,
        cache=cache,
    )
    if isinstance(model, QuantizedViT):
        model.graphs.enabled = cuda_graphs
    if has_slow_weights(model):
        warnings.warn(TOO_WIDE, stacklevel=3)
    return model


def has_slow_weights(model: QuantizedViT | EngineModel) -> bool:
    """Whether a model runs on PyTorch and weights of its full range are what makes it slow here."""
    if isinstance(model, EngineModel) or model.settings.reduce_range:
        return False
    device = model.prefix.device
    return bool(slow_integers(device)) and slow_integers(device, model.max_weight()) == [TOO_WIDE]


def open_checkpoint(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    compiled: bool = False,
    runtime: str = AUTO,
    tune: bool = False,
    batch: int = 1,
    cache: str | Path | None = None,
) -> QuantizedViT | EngineModel:
    """Load as :func:`load` does, without the warning about slow weights."""
    target = resolve_device(device)
    _check(runtime, tune, batch, target, compiled)
    if runtime == TORCH or target.type != "cpu" or compiled:
        return checkpoints.load(path, device=target, compiled=compiled)
    if runtime == AUTO:
        return _tuned(path, batch, cache) if tune else _recorded(path, batch, cache)
    info, digest = checkpoints.read_info(path), checkpoints.verified_digest(path)
    return open_engine(path, info, digest, runtime, cache)


def _check(runtime: str, tune: bool, batch: int, device: torch.device, compiled: bool) -> None:
    check_runtime(runtime)
    if not 1 <= batch <= MAX_BATCH:
        raise SettingError(f"batch is {batch}; it is from 1 to {MAX_BATCH}.")
    if runtime not in (AUTO, TORCH):
        if device.type != "cpu":
            raise DeviceError(
                f"runtime {runtime!r} runs on the CPU, not on {str(device)!r}. Leave device out, "
                "or use runtime 'torch'."
            )
        if compiled:
            raise SettingError(f"compiled is of runtime 'torch', not of {runtime!r}.")
    if tune and (runtime != AUTO or device.type != "cpu" or compiled):
        raise SettingError(
            "tune chooses among the runtimes of a CPU: it goes with runtime 'auto', device 'cpu' "
            "and compiled=False."
        )


def recorded_runtime(path: str | Path, batch: int = 1, cache: str | Path | None = None) -> str:
    """Return the runtime that ``auto`` means for a checkpoint on this machine."""
    digest = checkpoints.recorded_digest(path)
    return Choices(digest, cache, torch.get_num_threads()).recorded(batch) or TORCH


def _recorded(path: str | Path, batch: int, cache: str | Path | None) -> QuantizedViT | EngineModel:
    """Load with the recorded runtime; with PyTorch if that does not open any more."""
    name = recorded_runtime(path, batch, cache)
    if name == TORCH:
        return checkpoints.load(path)
    info, digest = checkpoints.read_info(path), checkpoints.verified_digest(path)
    try:
        return open_engine(path, info, digest, name, cache)
    except (DfqError, RuntimeError, OSError) as error:  # engines document no list of errors
        warnings.warn(
            f"runtime {name!r} was measured as the fastest for {str(path)!r}, but does not open "
            f"({first_line(error)}); the checkpoint runs on PyTorch.",
            stacklevel=2,
        )
        return checkpoints.load(path)


def _tuned(path: str | Path, batch: int, cache: str | Path | None) -> QuantizedViT | EngineModel:
    """Load with the fastest runtime, measured unless this batch size is recorded."""
    digest = checkpoints.recorded_digest(path)
    choices = Choices(digest, cache, torch.get_num_threads(), path)
    if batch not in choices.read():
        choices.save(batch, _speeds(path, batch, cache))
    return _recorded(path, batch, cache)


def _speeds(path: str | Path, batch: int, cache: str | Path | None) -> dict[str, float]:
    """Measure PyTorch and the installed engines that run the checkpoint here."""
    info, digest = checkpoints.read_info(path), checkpoints.verified_digest(path)
    images = random_images(info.arch, info.preprocessing, batch)
    models: dict[str, QuantizedViT | EngineModel] = {TORCH: checkpoints.load(path)}
    for name in installed_engines():
        try:
            model = open_engine(path, info, digest, name, cache)
            model(images[:1])
        except (DfqError, RuntimeError, OSError) as error:
            warnings.warn(f"runtime {name!r} is not measured: {first_line(error)}", stacklevel=2)
        else:
            models[name] = model
    return measure(models, images)
