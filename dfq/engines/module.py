"""A checkpoint on an engine as an ``nn.Module``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dfq.checkpoint import CheckpointInfo
from dfq.engines.entries import EngineModelFiles
from dfq.engines.sessions import ENGINES, Predict
from dfq.errors import DataError, DeviceError, SettingError
from dfq.quantization.layers import check_types
from dfq.quantization.scheme import Scheme
from dfq.vit.modules import check_images

TORCH_INSTEAD = "Load the checkpoint with runtime='torch' for that."


class EngineModel(nn.Module):
    """Quantized ViT on another runtime, called like :class:`~dfq.quantization.model.QuantizedViT`.

    Takes normalized images ``[N, C, H, W]`` on the CPU, any N, and returns float32 logits.  It has
    neither parameters nor buffers, runs on as many threads as PyTorch has, and may be called from
    several Python threads.  A copy shares the engine's memory.  A pickle names files,
    it does not hold them: it can be loaded where the checkpoint or its entry in the cache is.

    Inference on whole images only: training mode, gradients, sparse images and GPUs are refused.
    """

    def __init__(self, info: CheckpointInfo, session: Session) -> None:
        super().__init__()
        self.arch, self.preprocessing = info.arch, info.preprocessing
        self.settings = info.recipe.quantization
        self.scheme = Scheme(self.settings)
        self._session = session
        self.eval()

    @property
    def backend(self) -> str:
        """Name of the engine."""
        return self._session.files.engine.name

    @property
    def compiled(self) -> bool:
        """Whether :meth:`compile` has been called: never."""
        return False

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 logits of normalized images ``[N, C, H, W]`` of the model's size.

        Values outside the input range (pixels from 0 to 255) are clamped to it.  An image with a
        NaN or infinite value has NaN logits.

        Raises:
            DataError: the images have another size or dtype, are not on the CPU or want gradients.
        """
        check_images(images, self.arch)
        if images.device.type != "cpu":
            raise DataError(
                f"The model runs on the CPU ({self.backend}); got images on {images.device}. "
                f"Move them there with .cpu(). {TORCH_INSTEAD}"
            )
        if images.requires_grad and torch.is_grad_enabled():
            raise DataError(
                f"The model runs on {self.backend}, which gives no gradients; got images with "
                f"requires_grad. Use images.detach() or torch.no_grad()."
            )
        return self._logits(images.detach().float().contiguous())

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(0, self.arch.num_classes or self.arch.embed_dim)
        logits = torch.from_numpy(self._session.run(x.numpy(), torch.get_num_threads()))
        return logits + (x - x).sum((1, 2, 3))[:, None]

    def forward_sparse(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Raise :class:`SettingError`: engines take whole images only."""
        self._refuse("takes whole images, not sparse ones")

    def set_backend(self, name: str | None) -> EngineModel:
        """Do nothing for None or the engine's own name.

        Raises:
            SettingError: another backend is named.
        """
        if name not in (None, self.backend):
            self._refuse(f"has no backend {name!r}")
        return self

    def max_weight(self) -> int:
        """Largest magnitude of the integers that linear layers multiply."""
        return self._session.facts.max_weight

    def compile(self, *_: Any, **__: Any) -> None:
        """Raise :class:`SettingError`: PyTorch does not run the model."""
        self._refuse("is not run by PyTorch, so torch.compile does nothing for it")

    def train(self, mode: bool = True) -> EngineModel:
        """Set evaluation mode.

        Raises:
            SettingError: ``mode`` is True.
        """
        if mode:
            self._refuse("cannot be trained")
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> EngineModel:
        """Do nothing for False.

        Raises:
            SettingError: ``requires_grad`` is True.
        """
        if requires_grad:
            self._refuse("gives no gradients")
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> EngineModel:  # noqa: ARG002
        """Refuse other devices and dtypes; there are no tensors to convert."""
        probe = torch.zeros(1, dtype=torch.float32, device="cpu")
        try:
            device = fn(probe).device.type
        except (RuntimeError, AssertionError, NotImplementedError):  # a device that is not there
            device = "a GPU"
        if device != "cpu":
            raise DeviceError(
                f"A model on {self.backend} runs on the CPU and cannot be moved to {device}. "
                f"{TORCH_INSTEAD}"
            )
        check_types(fn)
        return self

    def extra_repr(self) -> str:
        return f"{self.backend}, {self.scheme.name}"

    def _refuse(self, why: str) -> NoReturn:
        raise SettingError(f"A model on {self.backend} {why}. {TORCH_INSTEAD}")


class Session:
    """An engine's open model, opened again when the number of threads changes.

    ``facts``: the model's, as they were when its files were last verified.
    """

    def __init__(self, files: EngineModelFiles, threads: int) -> None:
        self.files = files
        self._lock = threading.Lock()
        predict, self.facts = files.open(threads)
        self._open = (threads, predict)

    def run(self, images: Any, threads: int) -> Any:
        """Return logits float32 ``[N, classes]`` of images ``[N, C, H, W]``, N >= 1."""
        return self._with(threads)(images)

    def _with(self, threads: int) -> Predict:
        with self._lock:
            if self._open[0] != threads:
                predict, self.facts = self.files.open(threads)
                self._open = (threads, predict)
            return self._open[1]

    def __deepcopy__(self, _: Any) -> Session:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.files,)


def _open_again(files: EngineModelFiles) -> Session:
    """Open the model of a pickle."""
    return Session(files, torch.get_num_threads())


def open_engine(
    path: str | Path, info: CheckpointInfo, digest: str, engine: str, cache: str | Path | None
) -> EngineModel:
    """Open a checkpoint on the named engine; see :meth:`EngineModelFiles.open` for errors."""
    place = None if cache is None else Path(cache).absolute()
    files = EngineModelFiles(Path(path).absolute(), digest, info, ENGINES[engine], place)
    return EngineModel(info, Session(files, torch.get_num_threads()))
