"""Objectives of inversion: a class, or a direction of the pooled feature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.errors import SettingError
from dfq.vit import Architecture
from dfq.vit.logits import label_count

DIRECTION_WEIGHT = 10.0
"""Weight of the cosine; it brings its gradient to the size of a cross-entropy's."""


def seeded(seed: int, what: str, index: int) -> torch.Generator:
    """Return a generator for one purpose of a run, independent of all others."""
    digest = hashlib.sha256(f"dfq {what} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


Kind = Literal["class", "binary", "direction"]


class Objective(Protocol):
    """Objective of the images of a unit of work, one row per trajectory.

    ``loss`` and ``score`` compare outputs with ``targets``, which may be on any device.
    """

    kind: Kind
    labels: Tensor
    targets: Tensor

    def loss(self, outputs: Tensor) -> Tensor:
        """Return the loss of the model's outputs, summed over the images."""

    def score(self, outputs: Tensor) -> Tensor:
        """Return the output that is maximized, summed over the images; it does not saturate."""


class ClassObjective:
    """Cross-entropy with one target class per image (arXiv 1912.08795, section 3.1)."""

    kind: Kind = "class"

    def __init__(self, seed: int, first: int, count: int, classes: Sequence[int]) -> None:
        self.labels = self.targets = _balanced(seed, first, count, classes)

    def loss(self, outputs: Tensor) -> Tensor:
        targets = self.targets.to(outputs.device)
        return F.cross_entropy(outputs.float(), targets, reduction="sum")

    def score(self, outputs: Tensor) -> Tensor:
        return outputs.float().gather(1, self.targets.to(outputs.device)[:, None]).sum()


class BinaryObjective:
    """Binary cross-entropy of a single logit with one target per image, 0 or 1."""

    kind: Kind = "binary"

    def __init__(self, seed: int, first: int, count: int, classes: Sequence[int]) -> None:
        self.labels = self.targets = _balanced(seed, first, count, classes)

    def loss(self, outputs: Tensor) -> Tensor:
        logits = outputs[:, 0].float()
        targets = self.targets.to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")

    def score(self, outputs: Tensor) -> Tensor:
        logits = outputs[:, 0].float()
        return ((2 * self.targets.to(logits) - 1) * logits).sum()


class DirectionObjective:
    """Cosine of the pooled feature with a random direction for each trajectory.

    For models without a classifier.  The direction of trajectory ``t`` is a standard normal
    vector seeded by (seed, ``t``); the label of its images is ``t``.
    """

    kind: Kind = "direction"

    def __init__(self, seed: int, first: int, count: int, width: int) -> None:
        self.labels = torch.arange(first, first + count)
        self.directions = self.targets = torch.stack(
            [torch.randn(width, generator=seeded(seed, "direction", int(t))) for t in self.labels]
        )

    def loss(self, outputs: Tensor) -> Tensor:
        return -DIRECTION_WEIGHT * self.score(outputs)

    def score(self, outputs: Tensor) -> Tensor:
        targets = self.targets.to(outputs.device)
        return F.cosine_similarity(outputs.float(), targets, dim=1).sum()


def objective_of(arch: Architecture) -> Kind:
    """Return the kind of objective for a model."""
    if arch.num_classes == 1:
        return "binary"
    return "class" if arch.num_classes else "direction"


def check_classes(arch: Architecture, classes: Sequence[int]) -> None:
    """Raise :class:`SettingError` unless the model has all of these classes."""
    if classes and not arch.num_classes:
        raise SettingError(
            f"classes is {tuple(classes)}, but the model has no classifier; leave classes empty."
        )
    count = label_count(arch)
    unknown = [c for c in classes if c >= count]
    if unknown:
        raise SettingError(f"classes has {unknown[0]}; the model's classes are 0 to {count - 1}.")


def make_objective(
    arch: Architecture, seed: int, first: int, count: int, classes: Sequence[int] = ()
) -> Objective:
    """Return the objective of trajectories ``first`` to ``first + count``.

    If ``classes`` is empty, all classes are targets.
    """
    kind = objective_of(arch)
    if kind == "direction":
        return DirectionObjective(seed, first, count, arch.embed_dim)
    of_classes = BinaryObjective if kind == "binary" else ClassObjective
    return of_classes(seed, first, count, classes or range(label_count(arch)))


def _balanced(seed: int, first: int, count: int, classes: Sequence[int]) -> Tensor:
    """Return classes int64 ``[count]``: each once in random order, then anew."""
    labels = []
    for index in range(first, first + count):
        turn, place = divmod(index, len(classes))
        order = torch.randperm(len(classes), generator=seeded(seed, "targets", turn))
        labels.append(classes[int(order[place])])
    return torch.tensor(labels)
