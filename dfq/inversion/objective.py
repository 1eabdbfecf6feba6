"""What inversion asks of an image: a class, or a direction of the pooled feature."""

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
"""Weight of the cosine, which brings its gradient to the size of a cross-entropy's."""


def seeded(seed: int, what: str, index: int) -> torch.Generator:
    """A generator of its own for one thing of one run, independent of all others."""
    digest = hashlib.sha256(f"dfq {what} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


Kind = Literal["class", "binary", "direction"]


class Objective(Protocol):
    """What the images of one unit of work are optimised for; rows are trajectories.

    ``targets`` are what ``loss`` and ``score`` compare outputs with, on any device.
    """

    kind: Kind
    labels: Tensor
    targets: Tensor

    def loss(self, outputs: Tensor) -> Tensor:
        """Sum over the unit's images of what is minimised, for the model's outputs."""

    def score(self, outputs: Tensor) -> Tensor:
        """Sum over the images of the output that is to grow; it does not saturate."""


class ClassObjective:
    """Cross-entropy of a target class each (arXiv 1912.08795, section 3.1)."""

    kind: Kind = "class"

    def __init__(self, seed: int, first: int, count: int, classes: Sequence[int]) -> None:
        self.labels = self.targets = _balanced(seed, first, count, classes)

    def loss(self, outputs: Tensor) -> Tensor:
        targets = self.targets.to(outputs.device)
        return F.cross_entropy(outputs.float(), targets, reduction="sum")

    def score(self, outputs: Tensor) -> Tensor:
        return outputs.float().gather(1, self.targets.to(outputs.device)[:, None]).sum()


class BinaryObjective:
    """Cross-entropy of one of the two classes of a single logit each, 0 or 1."""

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
    """What images of such a model are made for."""
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
    """The objective of trajectories ``first`` to ``first + count``; no ``classes`` are all."""
    kind = objective_of(arch)
    if kind == "direction":
        return DirectionObjective(seed, first, count, arch.embed_dim)
    of_classes = BinaryObjective if kind == "binary" else ClassObjective
    return of_classes(seed, first, count, classes or range(label_count(arch)))


def _balanced(seed: int, first: int, count: int, classes: Sequence[int]) -> Tensor:
    """Classes int64 ``[count]``: every class comes once, in random order, before any again."""
    labels = []
    for index in range(first, first + count):
        turn, place = divmod(index, len(classes))
        order = torch.randperm(len(classes), generator=seeded(seed, "targets", turn))
        labels.append(classes[int(order[place])])
    return torch.tensor(labels)
