"""Training loop: a student learns a teacher's soft labels on sparse images."""

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
"""Number of recorded losses, each the mean over an equal part of the run."""


@dataclass(frozen=True)
class Images:
    """Sparse images in memory, as bytes, grouped by their number of patches."""

    groups: list[SparseImages]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @classmethod
    def gather(cls, batches: Iterator[SparseImages]) -> Images:
        """Collect the images of batches."""
        groups: dict[int, list[SparseImages]] = {}
        for batch in batches:
            groups.setdefault(batch.patches.shape[1], []).append(batch)
        return cls([join(parts) for _, parts in sorted(groups.items())])

    def draw(self, size: int, generator: torch.Generator) -> SparseImages:
        """Draw at most ``size`` images with the same number of patches, each equally likely."""
        share = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(share, 1, generator=generator))]
        return group[torch.randperm(len(group), generator=generator)[:size]]


def random_jitter(
    images: SparseImages, grid: Grid, share: float, flip: bool, g: torch.Generator
) -> SparseImages:
    """Return the images rolled by whole patches and mirrored, the same for the whole batch.

    ``share``: largest roll, as a share of the grid's side.  ``flip``: mirror half of the batches.
    """
    down, right, mirrored = draw(grid, share, flip, g)
    table = move_table(grid, down, right, mirrored).to(images.positions.device)
    patches = mirror(images.patches, grid) if mirrored else images.patches
    return SparseImages(
        patches, table[images.positions], images.labels, images.stage, images.trajectory
    )


def random_contrast(images: SparseImages, contrast: float, g: torch.Generator) -> SparseImages:
    """Return the images with random contrast: pixels are scaled about a random level and clipped.

    The factor of each image is between ``1 / contrast`` and ``contrast``.

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
    """Train a timm student in place; returns :data:`RECORDS` mean losses.

    The loss is the Kullback-Leibler divergence of the student's from the teacher's
    prediction at ``temperature``, times its square (arXiv 1503.02531, section 2), on the same
    patches at the same positions; and ``features`` times the distance of their last patch tokens
    (arXiv 1412.6550, section 2.1) if the models have the same width.

    Raises:
        RunError: the loss is no longer finite.
    """
    device, grid = teacher.prefix.device, teacher.arch.grid
    precision = resolve_precision(settings.precision, device)
    generator = seeded(settings.seed, "distillation", 0)
    optimizer = torch.optim.AdamW(_parameter_groups(student, settings.weight_decay), lr=settings.lr)
    if device.type == "cpu":
        _disable_fused_attention(student)
    weight = settings.features if student.embed_dim == teacher.arch.embed_dim else 0.0
    student.train()
    losses: list[float] = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step, settings)
        batch = images.draw(settings.batch, generator).to(device)
        batch = random_jitter(batch, grid, settings.jitter, settings.flip, generator)
        batch = random_contrast(batch, settings.contrast, generator)
        x = pixels_to_input(batch.patches, preprocessing, grid)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            with torch.no_grad():
                target_tokens = teacher.tokens(x, batch.positions)
                target = teacher.classify(target_tokens)
                target_tokens = teacher.norm(target_tokens)
            features = tokens(student, x, batch.positions)
            logits = student.forward_head(features)
        loss = divergence(logits, target, settings.temperature)
        if weight:
            patches = x.shape[1]
            loss = loss + weight * distance(features[:, -patches:], target_tokens[:, -patches:])
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
    return _binned_means(losses)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean Kullback-Leibler divergence of logits ``[B, classes]``.

    It is taken at a temperature and multiplied by its square.
    """
    p = (class_logits(teacher.float()) / temperature).log_softmax(-1)
    q = (class_logits(student.float()) / temperature).log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of layer-normalized tokens ``[B, L, width]``.

    It is from 0 to 4, and about 2 for unrelated tokens.
    """
    width = student.shape[-1:]
    return F.mse_loss(F.layer_norm(student.float(), width), F.layer_norm(teacher.float(), width))


def rate(step: int, settings: DistillationSettings) -> float:
    """Return the factor of the step size: a linear warm-up, then cosine decay to 0."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def _disable_fused_attention(model: nn.Module) -> None:
    """Turn off fused attention in timm's modules, which takes longer on CPUs."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = False


def _parameter_groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Return parameter groups: weight decay for matrices, none for biases, norms and tokens."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or n.endswith(("token", "pos_embed"))]
    matrices = [p for n, p in named if not (p.ndim < 2 or n.endswith(("token", "pos_embed")))]
    return [{"params": matrices, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def _binned_means(losses: list[float]) -> list[float]:
    edges = [round(i * len(losses) / RECORDS) for i in range(RECORDS + 1)]
    parts = [losses[a:b] for a, b in pairwise(edges) if b > a]
    return [sum(part) / len(part) for part in parts]
