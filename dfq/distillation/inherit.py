"""Students that begin with their teacher's own weights."""

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
"""Modules of a block that timm and dfq name and lay out alike."""


def begin(model: nn.Module, arch: Architecture, teacher: ViT, start: Start) -> Start:
    """Give a timm student of architecture ``arch`` the weights it begins with; returns which.

    ``teacher``: the teacher's own, of as many of its blocks, evenly spaced (DistilBERT,
    arXiv 1910.01108, section 3).  ``random``: those it has.  ``auto``: the teacher's where they
    fit and are fewer, for with all of them there is nothing left to learn.

    Raises:
        SettingError: the teacher's are asked for and do not fit.
    """
    if start == "random" or (start == "auto" and arch.depth == teacher.arch.depth):
        return "random"
    reason = _misfit(arch, teacher.arch)
    if reason is None and not _has_biases(model, teacher):
        reason = "it has no biases where the teacher has"
    if reason is None:
        _inherit(model, teacher)
        return "teacher"
    if start == "teacher":
        raise SettingError(
            f"The student cannot start with its teacher's weights: {reason}. Leave "
            f"{option('student')}, {option('width')} and {option('heads')} out and set "
            f"{option('depth')} alone, or give {option('start', 'random')}."
        )
    return "random"


def spaced(count: int, depth: int) -> list[int]:
    """So many of ``depth`` blocks, evenly spaced, the first and the last among them."""
    if count == 1:
        return [depth - 1]
    return [round(index * (depth - 1) / (count - 1)) for index in range(count)]


def _misfit(student: Architecture, teacher: Architecture) -> str | None:
    """Why the teacher's blocks cannot be the student's, if they cannot."""
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
    """Modules with a weight and a bias: timm's, and the teacher's that fills it."""
    yield model.patch_embed.proj, teacher.patch_embed
    yield model.patch_embed.norm, teacher.patch_norm
    for name in ("norm_pre", "norm", "fc_norm", "head"):
        yield getattr(model, name), getattr(teacher, name)
    for theirs, index in zip(
        model.blocks, spaced(len(model.blocks), teacher.arch.depth), strict=True
    ):
        for part in PARTS:
            yield theirs.get_submodule(part), teacher.block(index).get_submodule(part)


def _has_biases(model: Any, teacher: ViT) -> bool:
    return all(
        isinstance(ours, nn.Identity) or theirs.bias is not None or not ours.bias.any()
        for theirs, ours in _pairs(model, teacher)
    )


@torch.no_grad()
def _inherit(model: Any, teacher: ViT) -> None:
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
