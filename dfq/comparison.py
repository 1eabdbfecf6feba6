"""Accuracy of a model, and agreement of two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import methodcaller
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Architecture, Preprocessing, ViT

Metric = Literal["top1", "cosine"]
"""How agreement is measured: the same top-1 class, or, of models without a classifier, the
cosine of the pooled features."""


EVALUATION_BATCH = 50
"""Images that both models see at once."""


def metric_of(arch: Architecture) -> Metric:
    """How agreement with such a model is measured."""
    return "top1" if arch.num_classes else "cosine"


@dataclass(frozen=True)
class Accuracy:
    """Shares from 0 to 1 over labelled images."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Comparison:
    """A quantized model beside the float model on the same images.

    ``agreement`` is the share of images with the same top-1 class, ``kl`` the mean
    Kullback-Leibler divergence of the quantized from the float prediction in nats; both
    None without a float model.  ``seconds`` is the quantized model's own time.  Accuracies
    are None without labels.  Without a classifier ``agreement`` is the mean cosine of the
    features, and ``kl`` is None.
    """

    images: int
    metric: Metric
    agreement: float | None
    kl: float | None
    seconds: float
    float: Accuracy | None
    quantized: Accuracy | None


Outputs = Callable[[ViT], Tensor]


@torch.inference_mode()
def compare(
    quantized: ViT,
    reference: ViT | None,
    batches: Iterable[tuple[Outputs, Tensor | None]],
    advance: Callable[[int], None] | None = None,
    *,
    metric: Metric = "top1",
) -> Comparison:
    """Run both models over batches, each a function from model to outputs and its labels.

    ``advance`` is called with the number of images after every batch.
    """
    count, same, divergence, seconds = 0, 0.0, 0.0, 0.0
    hits = {"quantized": [0, 0], "float": [0, 0]}
    labelled = metric == "top1"
    for outputs, labels in batches:
        started = time.perf_counter()
        ours = outputs(quantized).float().cpu()
        seconds += time.perf_counter() - started
        count += len(ours)
        theirs = None if reference is None else outputs(reference).float().cpu()
        if theirs is not None:
            same += _agreeing(ours, theirs, metric)
            divergence += _divergence(ours, theirs) if metric == "top1" else 0.0
        if labels is None:
            labelled = False
        elif labelled:
            _count_hits(hits["quantized"], ours, labels)
            if theirs is not None:
                _count_hits(hits["float"], theirs, labels)
        if advance is not None:
            advance(len(ours))
    compared = reference is not None and count > 0
    return Comparison(
        images=count,
        metric=metric,
        agreement=same / count if compared else None,
        kl=divergence / count if compared and metric == "top1" else None,
        float=_accuracy(hits["float"], count) if labelled and compared else None,
        quantized=_accuracy(hits["quantized"], count) if labelled and count else None,
        seconds=seconds,
    )


def _agreeing(ours: Tensor, theirs: Tensor, metric: Metric) -> float:
    """Sum over a batch: images of the same class, or cosines."""
    if metric == "top1":
        return int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return float(F.cosine_similarity(ours, theirs, dim=-1).sum())


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))


def _count_hits(hits: list[int], logits: Tensor, labels: Tensor) -> None:
    top = logits.topk(min(5, logits.shape[1]), dim=-1).indices
    right = top == labels[:, None].to(top.device)
    hits[0] += int(right[:, 0].sum())
    hits[1] += int(right.any(-1).sum())


def _accuracy(hits: list[int], count: int) -> Accuracy:
    return Accuracy(hits[0] / count, hits[1] / count)


def dense_batches(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterable[tuple[Outputs, Tensor | None]]:
    """Whole images and their labels, for :func:`compare`."""
    for images, labels in batches:
        moved = images.to(device)
        yield methodcaller("__call__", moved), labels


def sparse_batches(
    batches: Iterable[SparseImages], vit: ViT, preprocessing: Preprocessing
) -> Iterable[tuple[Outputs, Tensor | None]]:
    """Sparse images without labels, for :func:`compare`."""
    for batch in batches:
        moved = batch.to(vit.prefix.device)
        x = pixels_to_input(moved.patches, preprocessing.mean, preprocessing.std, vit.arch.grid)
        yield methodcaller("forward_sparse", x, moved.positions), None
