"""The training loop: a student learns a teacher's soft labels on sparse images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.device import resolve_precision
from dfq.distillation.student import tokens
from dfq.errors import RunError
from dfq.inversion.jitter import draw, mirror, move_table
from dfq.inversion.objective import seeded
from dfq.recipe import DistillationSettings
from dfq.sparse import Grid, SparseImages, join, pixels_to_input
from dfq.vit import Preprocessing, ViT
from dfq.vit.logits import class_logits

RECORDS = 50
"""Values of the loss that are kept, evenly spaced over the run."""


@dataclass(frozen=True)
class Images:
    """Sparse images in memory, as bytes, grouped by their number of patches."""

    groups: list[SparseImages]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @classmethod
    def gather(cls, batches: Iterator[SparseImages]) -> Images:
        """All images of some batches."""
        found: dict[int, list[SparseImages]] = {}
        for batch in batches:
            found.setdefault(batch.patches.shape[1], []).append(batch)
        return cls([join(parts) for _, parts in sorted(found.items())])

    def draw(self, size: int, generator: torch.Generator) -> SparseImages:
        """A random batch of at most ``size`` images of one number of patches; each image is
        as likely as any other."""
        share = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(share, 1, generator=generator))]
        return group[torch.randperm(len(group), generator=generator)[:size]]


def moved(
    images: SparseImages, grid: Grid, share: float, flip: bool, g: torch.Generator
) -> SparseImages:
    """The images rolled by whole patches and mirrored, all of a batch alike."""
    down, right, mirrored = draw(grid, share, flip, g)
    table = move_table(grid, down, right, mirrored).to(images.positions.device)
    patches = mirror(images.patches, grid) if mirrored else images.patches
    return SparseImages(
        patches, table[images.positions], images.labels, images.stage, images.trajectory
    )


def stretched(images: SparseImages, contrast: float, g: torch.Generator) -> SparseImages:
    """The images with each one's contrast multiplied by a random factor between ``1 / contrast``
    and ``contrast`` about a random level, and clipped to what pixels can be.

    Inverted images are textured everywhere; photographs have flat, dark and bright areas.
    """
    shape = (len(images), 1, 1)
    exponent = torch.empty(shape).uniform_(-1, 1, generator=g)
    level = torch.empty(shape).uniform_(0, 255, generator=g).to(images.patches.device)
    gain = torch.pow(contrast, exponent).to(images.patches.device)
    pixels = level + gain * (images.patches - level)
    return dataclasses.replace(images, patches=pixels.round_().clamp_(0, 255).to(torch.uint8))


def train(
    teacher: ViT,
    student: Any,
    images: Images,
    preprocessing: Preprocessing,
    settings: DistillationSettings,
    advance: Callable[[int], None],
) -> list[float]:
    """Train a timm student in place; returns the mean loss of each of :data:`RECORDS` stretches.

    The loss is the Kullback-Leibler divergence of the student's from the teacher's
    prediction at ``temperature``, times its square (arXiv 1503.02531, section 2), on the same
    patches at the same places; and ``features`` times the distance of their last patch tokens
    (arXiv 1412.6550, section 2.1) where they are of one width.

    Raises:
        RunError: the loss is no longer finite.
    """
    device, grid = teacher.prefix.device, teacher.arch.grid
    precision = resolve_precision(settings.precision, device)
    generator = seeded(settings.seed, "distillation", 0)
    optimizer = torch.optim.AdamW(_decayed(student, settings.weight_decay), lr=settings.lr)
    if device.type == "cpu":
        _unfuse(student)
    weight = settings.features if student.embed_dim == teacher.arch.embed_dim else 0.0
    student.train()
    losses: list[float] = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step, settings)
        batch = images.draw(settings.batch, generator).to(device)
        batch = moved(batch, grid, settings.jitter, settings.flip, generator)
        batch = stretched(batch, settings.contrast, generator)
        x = pixels_to_input(batch.patches, preprocessing, grid)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            with torch.no_grad():
                aim = teacher.tokens(x, batch.positions)
                target, aim = teacher.classify(aim), teacher.norm(aim)
            features = tokens(student, x, batch.positions)
            found = student.forward_head(features)
        loss = divergence(found, target, settings.temperature)
        if weight:
            kept = x.shape[1]
            loss = loss + weight * distance(features[:, -kept:], aim[:, -kept:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunError(
                f"The loss of distillation is {losses[-1]} at step {step}. Lower lr "
                f"({settings.lr}), or set precision to float32."
            )
        advance(1)
    student.eval()
    return _thinned(losses)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean divergence of logits ``[B, classes]`` at a temperature, times its square."""
    p = (class_logits(teacher.float()) / temperature).log_softmax(-1)
    q = (class_logits(student.float()) / temperature).log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square of the difference of tokens ``[B, L, width]``, each scaled to mean 0 and
    variance 1: from 0 to 4, about 2 where they have nothing to do with each other."""
    width = student.shape[-1:]
    return F.mse_loss(F.layer_norm(student.float(), width), F.layer_norm(teacher.float(), width))


def rate(step: int, settings: DistillationSettings) -> float:
    """Share of the step size: a linear warm-up, then half a cosine to 0."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def _unfuse(model: nn.Module) -> None:
    """Attention of timm's modules as two products: PyTorch's fused one takes longer on CPUs."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = False


def _decayed(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and tokens do not."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or n.endswith(("token", "pos_embed"))]
    matrices = [p for n, p in named if not (p.ndim < 2 or n.endswith(("token", "pos_embed")))]
    return [{"params": matrices, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def _thinned(losses: list[float]) -> list[float]:
    edges = [round(i * len(losses) / RECORDS) for i in range(RECORDS + 1)]
    parts = [losses[a:b] for a, b in pairwise(edges) if b > a]
    return [sum(part) / len(part) for part in parts]
