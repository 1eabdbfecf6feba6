"""Features and predictions of a float model, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration_bench.measure.logits import BATCH, LabeledImages
from dfq import LoadedModel, SparseImages
from dfq.sparse import patchify, pixels_to_input, unpatchify
from dfq.vit import ViT


def network_input(loaded: LoadedModel, images: SparseImages) -> Tensor:
    """Return normalized patches, float32 ``[B, L, D]``."""
    p = loaded.preprocessing
    return pixels_to_input(images.patches, p, loaded.vit.arch.grid)


def real_input(loaded: LoadedModel, data: LabeledImages, indices: range) -> Iterator[Tensor]:
    """Yield normalized batches ``[B, N, D]`` of labeled images."""
    p, grid = loaded.preprocessing, loaded.vit.arch.grid
    for start in range(0, len(indices), BATCH):
        chosen = list(indices[start : start + BATCH])
        pixels = torch.from_numpy(data.pixels[chosen]).permute(0, 3, 1, 2)
        yield pixels_to_input(patchify(pixels, grid), p, grid)


@torch.no_grad()
def block_features(vit: ViT, patches: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the outputs of all blocks, float32 ``[blocks, B, embed_dim]``: of the class token if
    the model pools it, else the mean over the patches."""
    pooled, start = vit.arch.pooled_tokens, vit.arch.num_prefix_tokens
    with watched(list(vit.blocks)) as outputs:
        vit.tokens(patches, positions)
    part = slice(0, pooled) if pooled else slice(start, None)
    return torch.stack([x[:, part].float().mean(1) for x in outputs])


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules inside the block."""
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class ClassMeans:
    """Mean features of real images by class and block."""

    def __init__(self, loaded: LoadedModel, data: LabeledImages, indices: range) -> None:
        features = [block_features(loaded.vit, x) for x in real_input(loaded, data, indices)]
        self.labels = torch.from_numpy(data.labels[list(indices)])
        joined = torch.cat(features, dim=1)
        self.known = self.labels.unique()
        self.means = torch.stack([joined[:, self.labels == c].mean(1) for c in self.known], dim=1)

    def cosines(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine of features ``[blocks, B, C]`` with the mean of their own class, and
        the mean cosine with the other classes, both ``[blocks]``, over images of known classes."""
        own = labels[:, None] == self.known
        seen = own.any(1)
        if not bool(seen.any()):
            missing = torch.full((len(features),), torch.nan)
            return missing, missing
        table = F.cosine_similarity(features[:, seen, None], self.means[:, None], dim=-1)
        mask = own[seen].float()
        mine = (table * mask).sum(2)
        rest = (table * (1 - mask)).sum(2) / (1 - mask).sum(1).clamp_min(1)
        return mine.mean(1), rest.mean(1)


@torch.no_grad()
def confidence(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean probability of the label, and the accuracy."""
    shares = outputs.float().softmax(-1)
    return {
        "confidence": float(shares.gather(1, labels[:, None]).mean()),
        "top1": float((outputs.argmax(-1) == labels).double().mean()),
    }


@torch.no_grad()
def filled(loaded: LoadedModel, images: SparseImages) -> Tensor:
    """Return logits of whole images whose missing patches have the data's mean color."""
    whole = unpatchify(network_input(loaded, images), images.positions, loaded.vit.arch.grid)
    outputs: Tensor = loaded.vit(whole)
    return outputs
