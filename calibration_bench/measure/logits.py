"""Logits on labeled images; those of the float model are computed once and cached."""

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
    """Labeled images in memory at a model's size: uint8 ``[N, H, W, C]``, labels ``[N]``."""

    name: str
    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of pixels and labels."""
        return hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()


def open_data(data: str, loaded: LoadedModel, limit: int | None) -> LabeledImages:
    """Load the first ``limit`` labeled images, as ``dfq evaluate`` does.

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
    """Return float32 logits ``[N, classes]`` of a model that takes normalized images."""
    outputs = []
    for start in range(0, len(data), BATCH):
        pixels = torch.from_numpy(data.pixels[start : start + BATCH]).permute(0, 3, 1, 2)
        outputs.append(model(images_to_input(pixels, preprocessing)).float())
    return torch.cat(outputs)


def float_logits(loaded: LoadedModel, data: LabeledImages, directory: Path) -> Tensor:
    """Return the float model's logits, cached in a file named by the model and the images."""
    name = hashlib.sha256(f"{loaded.fingerprint} {data.digest}".encode()).hexdigest()[:24]
    path = directory / f"{name}.npz"
    kept = _kept(path, len(data))
    if kept is not None:
        return kept
    outputs = logits(loaded.vit, data, loaded.preprocessing)
    make_directory(directory)
    buffer = io.BytesIO()
    np.savez(buffer, logits=outputs.numpy())
    write_bytes(path, buffer.getvalue())
    return outputs


def _kept(path: Path, count: int) -> Tensor | None:
    """Read cached logits; None if the file is missing, damaged or of another size."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            outputs = torch.from_numpy(content["logits"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return outputs if outputs.ndim == 2 and len(outputs) == count else None


def first_image(data: LabeledImages, path: Path) -> None:
    """Write an ``.npz`` with one image and its label."""
    buffer = io.BytesIO()
    np.savez(buffer, x=data.pixels[:1], y=data.labels[:1])
    write_bytes(path, buffer.getvalue())


def compare(ours: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy and agreement (0 to 1), and the mean KL divergence in nats of the quantized
    from the float prediction."""
    ours, reference = class_logits(ours), class_logits(reference)
    top, float_top = ours.argmax(-1), reference.argmax(-1)
    p, q = reference.double().log_softmax(-1), ours.double().log_softmax(-1)
    return {
        "accuracy": float((top == labels).double().mean()),
        "float_accuracy": float((float_top == labels).double().mean()),
        "agreement": float((top == float_top).double().mean()),
        "kl": float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
    }
