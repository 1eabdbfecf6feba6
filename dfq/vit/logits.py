"""What a model's logits stand for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfq.vit import Architecture


def label_count(arch: Architecture) -> int:
    """Classes that labels may name: two of a model with one logit, none of one without logits."""
    return 2 if arch.num_classes == 1 else arch.num_classes


def class_logits(logits: Tensor) -> Tensor:
    """Logits ``[B, classes]`` of all classes.

    A single logit is that of class 1 of two, ``log(p / (1 - p))``; it becomes the two logits of
    the same probabilities of which the first is 0.
    """
    return F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits
