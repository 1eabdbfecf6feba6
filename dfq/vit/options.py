"""What a caller says of a model that is given by name, and what its weights say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import vision_transformer
from torch import nn

from dfq.errors import SettingError, WeightsError
from dfq.vit.architecture import Architecture
from dfq.vit.names import State
from dfq.vit.translate import HEADS

POOLS = ("token", "avg", "map")

MOST_PATCHES = 1 << 16
"""Of an image: attention scores of a single head then take 17 GB."""


@dataclass(frozen=True)
class ModelOptions:
    """What is named beside a model's name; None where it is left to timm and the weights."""

    num_classes: int | None = None
    img_size: tuple[int, int] | None = None
    in_chans: int | None = None
    global_pool: str | None = None

    def check_same(self, arch: Architecture, what: str) -> None:
        """Raise :class:`SettingError` if a model that exists already is something else."""
        own = ModelOptions(arch.num_classes, arch.image_size, arch.in_channels, pool_of(arch))
        for option, value in dataclasses.asdict(self).items():
            has = getattr(own, option)
            if value not in (None, has):
                raise SettingError(
                    f"{option} is {_written(value)}, but {what} has {_written(has)}. It goes with "
                    "a model's name; leave it out."
                )

    def check_size(self, arch: Architecture) -> None:
        """Raise :class:`SettingError` unless the image holds from 1 to MOST_PATCHES patches."""
        if self.img_size is None:
            return
        height, width = arch.patch_size
        rows, columns = self.img_size[0] // height, self.img_size[1] // width
        if not rows or not columns:
            patch = height if height == width else f"{height} x {width}"
            raise SettingError(
                f"--img-size {_written(self.img_size)} is less than a patch of {patch} pixels."
            )
        if rows * columns > MOST_PATCHES:
            raise SettingError(
                f"--img-size {_written(self.img_size)} makes {rows * columns} patches of {height} "
                f"x {width} pixels; the most are {MOST_PATCHES}."
            )


def checked_options(
    num_classes: int | None,
    img_size: int | Sequence[int] | None,
    in_chans: int | None,
    global_pool: str | None,
) -> ModelOptions:
    """The options, in bounds.

    Raises:
        SettingError: one is out of its range.
    """
    sides: tuple[int, ...] = ()
    if img_size is not None:
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(sides) != 2:
            raise SettingError(
                f"--img-size has {len(sides)} numbers {sides}; give one side of a square, or "
                "height and width."
            )
    least = [("--num-classes", num_classes, 0), ("--in-chans", in_chans, 1)]
    for flag, value, bound in [*least, *(("--img-size", side, 1) for side in sides)]:
        if value is not None and value < bound:
            raise SettingError(f"{flag} is {value}; it must be at least {bound}.")
    if global_pool not in (None, *POOLS):
        raise SettingError(f"--global-pool is {global_pool!r}; known: {', '.join(POOLS)}.")
    size = (sides[0], sides[1]) if sides else None
    return ModelOptions(num_classes, size, in_chans, global_pool)


def pool_of(arch: Architecture) -> str:
    """timm's ``global_pool`` of a model."""
    return "token" if arch.pool == "distilled" else arch.pool


def size_flag(size: tuple[int, int]) -> str:
    """An image size in pixels as ``--img-size`` takes it."""
    height, width = size
    return str(height) if height == width else f"{height},{width}"


def _written(value: Any) -> str:
    return size_flag(value) if isinstance(value, tuple) else repr(value)


def told(outline: nn.Module, state: State, options: ModelOptions, path: Path) -> dict[str, Any]:
    """Keywords of ``timm.create_model`` for translated weights: what was asked for, and where
    it was left out what the weights show.

    ``outline`` is the model without them.

    Raises:
        WeightsError: the weights are of another shape than was asked for, or do not show it.
    """
    keywords: dict[str, Any] = {}
    classes, head = options.num_classes, state.get("head.weight")
    if classes is None and head is not None and head.ndim == 2:
        classes = len(head)
    if classes is None and not any(key.startswith(HEADS) for key in state):
        classes = 0
    if classes is not None:
        keywords["num_classes"] = classes
    channels = _channels(state)
    if channels is not None and options.in_chans not in (None, channels):
        raise WeightsError(
            f"{path.name!r} takes images of {channels} channels, not {options.in_chans}. Leave "
            f"--in-chans out, or set it to {channels}."
        )
    channels = options.in_chans if channels is None else channels
    if channels is not None and channels != cast(Any, outline).patch_embed.proj.in_channels:
        keywords["in_chans"] = channels
    return {**keywords, **_pooling(outline, state, options.global_pool, path)}


def _channels(state: State) -> int | None:
    weight = state.get("patch_embed.proj.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else None


def _pooling(model: Any, state: State, asked: str | None, path: Path) -> dict[str, Any]:
    """Keywords for the pooling that was asked for, or that the norms in a file show."""
    norms = {part: f"{part}.weight" in state for part in ("norm", "fc_norm")}
    by_query = any(key.startswith("attn_pool.") for key in state)
    own_query = getattr(model, "attn_pool", None) is not None
    known = any(norms.values())
    if asked is None:
        if by_query == own_query and (norms == norms_of(model) or not known):
            return {}
        if by_query:
            asked = "map"
        elif norms == {"norm": False, "fc_norm": True}:
            asked = "avg"
        else:
            where = "before" if norms["norm"] else "after"
            shows = "it has no query" if own_query else f"its last norm lies {where} the pooling"
            raise WeightsError(
                f"{path.name!r} was trained with another pooling than {model.global_pool!r}, which "
                f"the model has by default: {shows}. Name it with --global-pool token, avg or map."
            )
    return pool_keywords(model, asked, norms if known else norms_of(model))


def pool_keywords(model: Any, pool: str, norms: dict[str, bool]) -> dict[str, Any]:
    """Keywords of ``timm.create_model`` for a pooling, with the norms before and after it."""
    if pool == model.global_pool and norms == norms_of(model):
        return {}
    after = norms["fc_norm"] and not norms["norm"]
    is_vit = isinstance(model, vision_transformer.VisionTransformer)
    keyword = "fc_norm" if is_vit else "use_fc_norm"
    return {"global_pool": pool} | ({} if after == (pool == "avg") else {keyword: after})


def pooled_as(arch: Architecture, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of ``timm.create_model`` that give a model of others the pooling of ``arch``."""
    with torch.device("meta"):
        outline = timm.create_model(**keywords)
    norms = {"norm": arch.final_norm, "fc_norm": arch.pooled_norm}
    return pool_keywords(outline, pool_of(arch), norms)


def norms_of(model: nn.Module) -> dict[str, bool]:
    """Which of the norms before and after pooling a model has."""
    return {
        part: isinstance(model.get_submodule(part), nn.LayerNorm) for part in ("norm", "fc_norm")
    }
