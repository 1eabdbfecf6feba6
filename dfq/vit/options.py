"""Options of a model given by name, and options inferred from its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import timm
import torch
from timm.models import vision_transformer
from torch import nn

from dfq.argument_names import option
from dfq.errors import SettingError, WeightsError
from dfq.vit.architecture import Architecture
from dfq.vit.names import State
from dfq.vit.translate import HEADS

POOLS = ("token", "avg", "map")

MAX_PATCHES = 1 << 16
"""Largest number of patches; attention scores of a single head then take 17 GB."""


class WeightsOptions(TypedDict, total=False):
    """Arguments that choose the weights and the shape of a model given by name.

    ``weights``: a safetensors or torch file to load instead of pretrained weights.  ``img_size``:
    side of the square input in pixels, or its height and width.  ``in_chans``: channels of the
    input.  ``global_pool``: ``token``, ``avg`` or ``map``.
    """

    weights: str | Path | None
    img_size: int | Sequence[int] | None
    in_chans: int | None
    global_pool: str | None


class LoadOptions(WeightsOptions, total=False):
    """Arguments of :func:`dfq.load_model` beside the model, which all verbs take too.

    ``num_classes``: classes of the head, 0 for none.  ``mean``, ``std``: per channel.
    ``input_range``: the lowest and the highest value before normalization.
    """

    num_classes: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    input_range: Sequence[float] | None


@dataclass(frozen=True)
class ModelOptions:
    """Options given with a model's name; None means timm's default or the weights decide."""

    num_classes: int | None = None
    img_size: tuple[int, int] | None = None
    in_chans: int | None = None
    global_pool: str | None = None

    def check_same(self, arch: Architecture, what: str) -> None:
        """Raise :class:`SettingError` if an existing model differs from the options."""
        own = ModelOptions(arch.num_classes, arch.image_size, arch.in_channels, pool_of(arch))
        for name, value in dataclasses.asdict(self).items():
            has = getattr(own, name)
            if value not in (None, has):
                raise SettingError(
                    f"{option(name)} is {_format_value(value)}, but {what} has "
                    f"{_format_value(has)}. It goes with a model's name; leave it out."
                )

    def check_size(self, arch: Architecture) -> None:
        """Raise :class:`SettingError` unless the image has 1 to MAX_PATCHES patches."""
        if self.img_size is None:
            return
        height, width = arch.patch_size
        rows, columns = self.img_size[0] // height, self.img_size[1] // width
        if not rows or not columns:
            patch = height if height == width else f"{height} x {width}"
            raise SettingError(
                f"{option('img_size')} is {size_value(self.img_size)}, less than a patch of "
                f"{patch} pixels."
            )
        if rows * columns > MAX_PATCHES:
            raise SettingError(
                f"{option('img_size')} is {size_value(self.img_size)}, which makes "
                f"{rows * columns} patches of {height} x {width} pixels; the most are "
                f"{MAX_PATCHES}."
            )


def validate_options(
    num_classes: int | None,
    img_size: int | Sequence[int] | None,
    in_chans: int | None,
    global_pool: str | None,
) -> ModelOptions:
    """Check the options' ranges and return them.

    Raises:
        SettingError: an option is out of range.
    """
    sides: tuple[int, ...] = ()
    if img_size is not None:
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(sides) != 2:
            raise SettingError(
                f"{option('img_size')} has {len(sides)} numbers {sides}; give one side of a "
                "square, or height and width."
            )
    least = [("num_classes", num_classes, 0), ("in_chans", in_chans, 1)]
    for name, value, bound in [*least, *(("img_size", side, 1) for side in sides)]:
        if value is not None and value < bound:
            raise SettingError(f"{option(name)} is {value}; it must be at least {bound}.")
    if global_pool not in (None, *POOLS):
        raise SettingError(
            f"{option('global_pool')} is {global_pool!r}; known: {', '.join(POOLS)}."
        )
    size = (sides[0], sides[1]) if sides else None
    return ModelOptions(num_classes, size, in_chans, global_pool)


def pool_of(arch: Architecture) -> str:
    """Return timm's ``global_pool`` of an architecture."""
    return "token" if arch.pool == "distilled" else arch.pool


def size_value(size: tuple[int, int]) -> int | tuple[int, int]:
    """Return an image size as ``img_size``: the side of a square, or height and width."""
    height, width = size
    return height if height == width else size


def _format_value(value: Any) -> str:
    return str(size_value(value)) if isinstance(value, tuple) else repr(value)


def infer_keywords(
    meta_model: nn.Module, state: State, options: ModelOptions, path: Path
) -> dict[str, Any]:
    """Infer the keywords of ``timm.create_model`` from weights under timm's names.

    Given options take precedence.  ``meta_model`` is the model without weights.

    Raises:
        WeightsError: the weights contradict an option, or are ambiguous.
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
            f"{option('in_chans')} out, or set it to {channels}."
        )
    channels = options.in_chans if channels is None else channels
    if channels is not None and channels != cast(Any, meta_model).patch_embed.proj.in_channels:
        keywords["in_chans"] = channels
    return {**keywords, **_pooling(meta_model, state, options.global_pool, path)}


def _channels(state: State) -> int | None:
    weight = state.get("patch_embed.proj.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else None


def _pooling(model: Any, state: State, asked: str | None, path: Path) -> dict[str, Any]:
    """Return the keywords of the requested pooling, or of the one inferred from the norms."""
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
                f"the model has by default: {shows}. Name it with "
                f"{option('global_pool')}: token, avg or map."
            )
    return pool_keywords(model, asked, norms if known else norms_of(model))


def pool_keywords(model: Any, pool: str, norms: dict[str, bool]) -> dict[str, Any]:
    """Return the keywords of ``timm.create_model`` for a pooling and the norms around it."""
    if pool == model.global_pool and norms == norms_of(model):
        return {}
    after = norms["fc_norm"] and not norms["norm"]
    is_vit = isinstance(model, vision_transformer.VisionTransformer)
    keyword = "fc_norm" if is_vit else "use_fc_norm"
    return {"global_pool": pool} | ({} if after == (pool == "avg") else {keyword: after})


def matching_pool_keywords(arch: Architecture, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that give ``timm.create_model(**keywords)`` the pooling of ``arch``."""
    with torch.device("meta"):
        meta_model = timm.create_model(**keywords)
    norms = {"norm": arch.final_norm, "fc_norm": arch.pooled_norm}
    return pool_keywords(meta_model, pool_of(arch), norms)


def norms_of(model: nn.Module) -> dict[str, bool]:
    """Return whether a model has norms before (``norm``) and after (``fc_norm``) pooling."""
    return {
        part: isinstance(model.get_submodule(part), nn.LayerNorm) for part in ("norm", "fc_norm")
    }
