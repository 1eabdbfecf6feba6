"""Classes of a model's logits; a single logit means two classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfq.vit import Architecture


def label_count(arch: Architecture) -> int:
    """Return the number of classes: 2 for a single logit, 0 without a classifier."""
    return 2 if arch.num_classes == 1 else arch.num_classes


def class_logits(logits: Tensor) -> Tensor:
    """Return logits ``[B, classes]`` of all classes.

    A single logit, ``log(p / (1 - p))`` of class 1, becomes two logits of the same probabilities,
    the first of which is 0.
    """
    return F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits
