"""Students: new timm models with a token-sparse forward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dfq import demo
from dfq.argument_names import option
from dfq.errors import SettingError, UnknownModelError
from dfq.vit import Architecture
from dfq.vit.describe import describe
from dfq.vit.options import matching_pool_keywords
from dfq.vit.saved import TIMM_MODULES, building_arguments
from dfq.vit.sizes import BOUNDS

SHAPE = {"depth": "depth", "embed_dim": "width", "num_heads": "heads"}
"""Arguments of a student's size: timm's names, and dfq's."""


def student_arguments(
    name: str | None,
    teacher: Architecture,
    timm_name: str,
    saved: Path | None = None,
    **shape: int | None,
) -> dict[str, Any]:
    """Return arguments of ``timm.create_model`` for a student that reads the teacher's images.

    Without ``name`` the student is the teacher's model, with the same pooling; ``saved`` is its
    directory if dfq wrote it.  ``depth``, ``embed_dim`` and ``num_heads`` change its size.

    Raises:
        UnknownModelError: timm has no model of that name.
        SettingError: a number is out of range.
    """
    _check(shape)
    base: dict[str, Any] = {"model_name": name or timm_name.partition(".")[0]}
    if (name or timm_name) == "demo":
        base = dict(demo.MODEL_ARGS)
    elif name is None and saved is not None:
        base = building_arguments(saved)
    if not timm.is_model(base["model_name"]):
        raise UnknownModelError(
            f"The student {base['model_name']!r} is no model of timm's; `dfq models` lists names. "
            f"A teacher that was given as a module needs a named student: give {option('student')}."
        )
    height, width = teacher.image_size
    pooling = {} if name is not None else matching_pool_keywords(teacher, base)
    return {
        **base,
        **pooling,
        "img_size": height if height == width else (height, width),
        "in_chans": teacher.in_channels,
        "num_classes": teacher.num_classes,
        **{key: shape[key] for key in SHAPE if shape.get(key) is not None},
    }


def _check(shape: Mapping[str, int | None]) -> None:
    for key, value in shape.items():
        most = int(BOUNDS[key][1])
        if value is not None and not 1 <= value <= most:
            raise SettingError(f"{option(SHAPE[key])} is {value}; a student has from 1 to {most}.")
    width, heads = shape.get("embed_dim"), shape.get("num_heads")
    if width is not None and heads is not None and width % heads:
        raise SettingError(
            f"{option('width')} is {width}, {option('heads')} {heads}; the heads share the "
            f"width evenly, so it must be a multiple of {heads}."
        )


def create(
    arguments: dict[str, Any], teacher: Architecture, seed: int
) -> tuple[nn.Module, Architecture]:
    """Create a student with random weights; returns it with its architecture.

    Raises:
        SettingError: it cannot be built, or does not read the teacher's patches.
    """
    name = arguments["model_name"]
    if not is_model_in_modules(name, TIMM_MODULES):
        raise _not_a_student(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(**arguments, pretrained=False)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        shape = [f"{SHAPE[key]} {arguments[key]}" for key in SHAPE if key in arguments]
        raise SettingError(
            f"timm cannot build the student {name!r} with {', '.join(shape) or 'its own shape'} "
            f"at {arguments['img_size']} pixels: {error}. The heads share the width evenly, and "
            "the image holds at least one patch."
        ) from error
    arch = describe(model, name)
    if type(model) is not VisionTransformer or arch.pool == "distilled":
        raise _not_a_student(name)
    if arch.grid != teacher.grid:
        raise SettingError(
            f"The student cuts images into patches of {arch.patch_size} pixels, the teacher into "
            f"{teacher.patch_size}; sparse images are made of the teacher's patches. Choose a "
            f"student of that patch size, or leave {option('student')} out and set "
            f"{option('depth')}, {option('width')}, {option('heads')}."
        )
    return model, arch


def _not_a_student(name: str) -> SettingError:
    return SettingError(
        f"{name!r} cannot be a student: only timm's VisionTransformer with learned position "
        "embeddings and one head can be trained on sparse images. Choose such a model, as "
        f"`dfq models vit` lists them, or leave {option('student')} out."
    )


def tokens(model: Any, patches: Tensor, positions: Tensor) -> Tensor:
    """Return tokens ``[B, prefix + L, width]`` of a timm ViT after its last norm, for patches
    ``[B, L, D]`` at ``positions`` ``[B, L]``.

    Trains timm's own parameters; with timm's ``forward_head`` equal to
    :meth:`dfq.vit.ViT.forward_sparse` of the converted model.
    """
    embed = model.patch_embed
    x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
    prefix = [t for t in (model.cls_token, getattr(model, "reg_token", None)) if t is not None]
    first = torch.cat(prefix, dim=1) if prefix else x.new_zeros(1, 0, x.shape[-1])
    if model.pos_embed is not None:
        table = model.pos_embed[0]
        if not model.no_embed_class:
            first = first + table[: first.shape[1]]
            table = table[first.shape[1] :]
        x = x + F.embedding(positions, table)
    x = torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
    normed: Tensor = model.norm(model.blocks(model.norm_pre(x)))
    return normed
