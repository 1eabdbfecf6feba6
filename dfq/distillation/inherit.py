"""Initialization of a student from its teacher's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dfq.argument_names import option
from dfq.errors import SettingError
from dfq.recipe import Start
from dfq.vit import Architecture, ViT

PARTS = (
    "norm1",
    "norm2",
    "attn.qkv",
    "attn.proj",
    "attn.q_norm",
    "attn.k_norm",
    "mlp.fc1",
    "mlp.fc2",
)
"""Modules of a block with the same names and shapes in timm and dfq."""


def initialize(model: nn.Module, arch: Architecture, teacher: ViT, start: Start) -> Start:
    """Initialize a timm student of architecture ``arch``; returns ``teacher`` or ``random``.

    ``teacher``: copy evenly spaced blocks of the teacher (DistilBERT, arXiv 1910.01108,
    section 3).  ``random``: keep the weights.  ``auto``: copy if the blocks fit and the student
    has fewer; with all of them it would equal the teacher.

    Raises:
        SettingError: ``start`` is ``teacher``, and the blocks do not fit.
    """
    if start == "random" or (start == "auto" and arch.depth == teacher.arch.depth):
        return "random"
    reason = _mismatch(arch, teacher.arch)
    if reason is None and not _has_biases(model, teacher):
        reason = "it has no biases where the teacher has"
    if reason is None:
        _copy_weights(model, teacher)
        return "teacher"
    if start == "teacher":
        raise SettingError(
            f"The student cannot start with its teacher's weights: {reason}. Leave "
            f"{option('student')}, {option('width')} and {option('heads')} out and set "
            f"{option('depth')} alone, or give {option('start', 'random')}."
        )
    return "random"


def spaced_blocks(count: int, depth: int) -> list[int]:
    """Return the indices of ``count`` of ``depth`` blocks, evenly spaced, with first and last."""
    if count == 1:
        return [depth - 1]
    return [round(index * (depth - 1) / (count - 1)) for index in range(count)]


def _mismatch(student: Architecture, teacher: Architecture) -> str | None:
    """Return why the teacher's blocks cannot be copied, None if they can."""
    theirs = dataclasses.asdict(teacher)
    for name, value in dataclasses.asdict(student).items():
        if name != "depth" and value != theirs[name]:
            return f"its {name} is {value}, the teacher's {theirs[name]}"
    if student.depth > teacher.depth:
        return f"it has {student.depth} blocks, the teacher {teacher.depth}"
    if teacher.gated_mlp or teacher.attn_norm or teacher.mlp_norm or teacher.pool == "map":
        return "blocks and poolings of this kind are not copied"
    return None


def _pairs(model: Any, teacher: ViT) -> Iterator[tuple[Any, Any]]:
    """Yield modules with a weight and a bias: the student's, and the teacher's to copy."""
    yield model.patch_embed.proj, teacher.patch_embed
    yield model.patch_embed.norm, teacher.patch_norm
    for name in ("norm_pre", "norm", "fc_norm", "head"):
        yield getattr(model, name), getattr(teacher, name)
    for theirs, index in zip(
        model.blocks, spaced_blocks(len(model.blocks), teacher.arch.depth), strict=True
    ):
        for part in PARTS:
            yield theirs.get_submodule(part), teacher.block(index).get_submodule(part)


def _has_biases(model: Any, teacher: ViT) -> bool:
    return all(
        isinstance(ours, nn.Identity) or theirs.bias is not None or not ours.bias.any()
        for theirs, ours in _pairs(model, teacher)
    )


@torch.no_grad()
def _copy_weights(model: Any, teacher: ViT) -> None:
    for theirs, ours in _pairs(model, teacher):
        if not isinstance(ours, nn.Identity):
            theirs.weight.copy_(ours.weight.reshape(theirs.weight.shape))
            if theirs.bias is not None:
                theirs.bias.copy_(ours.bias)
    for block in model.blocks:  # the teacher's layer scale is in its weights
        for scale in (block.ls1, block.ls2):
            if not isinstance(scale, nn.Identity):
                scale.gamma.fill_(1)
    prefix = teacher.prefix.detach()
    for token in (model.cls_token, getattr(model, "reg_token", None)):
        if token is not None:
            token.copy_(prefix[: token.shape[1]])
            prefix = prefix[token.shape[1] :]
    if model.pos_embed is not None:
        model.pos_embed.zero_()
        model.pos_embed[0, -teacher.arch.grid.patches :] = teacher.pos_embed
