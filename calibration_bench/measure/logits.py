"""Logits on labeled images, and the float model's, computed once and kept."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfq import LoadedModel
from dfq.data.images import open_images
from dfq.files import make_directory, write_bytes
from dfq.sparse import images_to_input
from dfq.vit import Preprocessing
from dfq.vit.logits import class_logits

BATCH = 50


@dataclass(frozen=True)
class LabeledImages:
    """Images at a model's size, held in memory: uint8 ``[N, H, W, C]``, labels ``[N]``."""

    name: str
    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over pixels and labels."""
        return hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()


def open_data(data: str, loaded: LoadedModel, limit: int | None) -> LabeledImages:
    """The first ``limit`` labeled images, read as ``dfq evaluate`` reads them.

    Raises:
        DataError: they are missing, unreadable or do not fit the model.
    """
    source = open_images(data, loaded.vit.arch, loaded.preprocessing, labeled=True)
    indices = range(min(len(source), limit or len(source)))
    return LabeledImages(
        Path(data).name,
        np.stack([source.pixels(i) for i in indices]),
        np.array([source.label(i) for i in indices], dtype=np.int64),
    )


@torch.inference_mode()
def logits(
    model: Callable[[Tensor], Tensor], data: LabeledImages, preprocessing: Preprocessing
) -> Tensor:
    """float32 ``[N, classes]`` of a model that takes normalized images."""
    found = []
    for start in range(0, len(data), BATCH):
        pixels = torch.from_numpy(data.pixels[start : start + BATCH]).permute(0, 3, 1, 2)
        found.append(model(images_to_input(pixels, preprocessing)).float())
    return torch.cat(found)


def float_logits(loaded: LoadedModel, data: LabeledImages, directory: Path) -> Tensor:
    """The float model's logits, from a file named by the model and the images."""
    name = hashlib.sha256(f"{loaded.fingerprint} {data.digest}".encode()).hexdigest()[:24]
    path = directory / f"{name}.npz"
    kept = _kept(path, len(data))
    if kept is not None:
        return kept
    found = logits(loaded.vit, data, loaded.preprocessing)
    make_directory(directory)
    buffer = io.BytesIO()
    np.savez(buffer, logits=found.numpy())
    write_bytes(path, buffer.getvalue())
    return found


def _kept(path: Path, count: int) -> Tensor | None:
    """What a file holds; None if it is missing, damaged or of another number of images."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            found = torch.from_numpy(content["logits"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return found if found.ndim == 2 and len(found) == count else None


def first_image(data: LabeledImages, path: Path) -> None:
    """An ``.npz`` with one image and its label."""
    buffer = io.BytesIO()
    np.savez(buffer, x=data.pixels[:1], y=data.labels[:1])
    write_bytes(path, buffer.getvalue())


def compare(ours: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares from 0 to 1 of right and of equal top-1 classes, and the mean KL divergence
    of the quantized from the float prediction in nats."""
    ours, reference = class_logits(ours), class_logits(reference)
    top, float_top = ours.argmax(-1), reference.argmax(-1)
    p, q = reference.double().log_softmax(-1), ours.double().log_softmax(-1)
    return {
        "accuracy": float((top == labels).double().mean()),
        "float_accuracy": float((float_top == labels).double().mean()),
        "agreement": float((top == float_top).double().mean()),
        "kl": float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
    }
