"""Importance of patches to the model's output."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from dfq.inversion.objective import Objective
from dfq.inversion.schedule import method_of
from dfq.inversion.schedules.method import Importance
from dfq.recipe import InversionSettings
from dfq.vit import Architecture, ViT

MEASURES: tuple[str, ...] = tuple(m for m in get_args(Importance) if m != "auto")


def ranking_of(settings: InversionSettings, arch: Architecture) -> Importance | None:
    """Return the measure by which the settings' method ranks the patches of a model.

    None for a method that does not rank.
    """
    method = method_of(settings)
    return resolve_importance(method.ranking(settings.importance), arch) if method.ranks else None


def resolve_importance(importance: Importance, arch: Architecture) -> Importance:
    """Return the measure that ``auto`` stands for: the pooling token's or query's attention.

    Average pooling has none; there no measure was better than chance, see
    ``docs/inversion.md``.
    """
    if importance != "auto":
        return importance
    return "random" if arch.pool == "avg" else "attention"


def importance_of(
    measure: Importance,
    vit: ViT,
    patches: Tensor,
    positions: Tensor,
    objective: Objective,
    generator: torch.Generator,
) -> Tensor:
    """Return the importance of the patches ``[B, L, D]`` at ``positions``, float32 ``[B, L]``.

    ``attention``: see :meth:`dfq.vit.ViT.importance`.  ``gradient``: L2 norm of the gradient
    of the objective's score with respect to the patch.  ``activation``: L2 norm of the
    patch's token after the last block.  ``random``: uniform from ``generator``.
    """
    if measure == "attention":
        return vit.importance(patches, positions)
    if measure == "gradient":
        return _gradient_norm(vit, patches, positions, objective)
    if measure == "activation":
        return _token_norm(vit, patches, positions)
    return torch.rand(positions.shape, generator=generator).to(patches.device)


def _gradient_norm(vit: ViT, patches: Tensor, positions: Tensor, objective: Objective) -> Tensor:
    with torch.enable_grad():
        leaf = patches.detach().requires_grad_()
        score = objective.score(vit.forward_sparse(leaf, positions))
        (gradient,) = torch.autograd.grad(score, leaf)
    return gradient.float().norm(dim=-1)


@torch.no_grad()
def _token_norm(vit: ViT, patches: Tensor, positions: Tensor) -> Tensor:
    tokens = vit.tokens(patches, positions)
    return tokens[:, vit.arch.num_prefix_tokens :].float().norm(dim=-1)
