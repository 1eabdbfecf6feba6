"""Renaming of a file's tensors to timm's names for a model; values are not changed."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from timm.models import beit, eva, vision_transformer
from torch import nn

from dfq.argument_names import option
from dfq.errors import WeightsError
from dfq.failures import explained, first_line
from dfq.vit.names import CLIP_PATCHES, RenamedState, State, extract_vit, patch_embedding

HEADS = ("head.", "head_dist.")
PRETRAINING_PREFIXES = ("mask_token", "decoder_", "lm_head.")
"""Prefixes of tensors that only masked pretraining uses."""

DINOV2_NAMES = re.compile(r"register_tokens$|blocks\.\d+\.mlp\.w12\.")


def translate(
    model: nn.Module, state: State, *, name: str, path: Path, headless: bool = False
) -> RenamedState:
    """Rename a state dict to timm's names for a model.

    ``model`` may be on the meta device.  ``headless``: omit heads, and ignore tensors outside the
    ViT.

    Raises:
        WeightsError: the names are of another format, or the patches of another size.
    """
    extracted = extract_vit(state, path, headless=headless)
    _check_patches(model, extracted.state, name, path)
    if not headless:
        _check_last_layers(extracted.state, path)
    converted = _rename_with_timm(model, extracted.state, name, path)
    converted = {k: v for k, v in converted.items() if not k.startswith(PRETRAINING_PREFIXES)}
    if headless:
        return RenamedState({k: v for k, v in converted.items() if not k.startswith(HEADS)})
    return replace(extracted, state=_with_plain_heads(converted, path))


class _WithoutPositions:
    """Proxy of a model without a position embedding, so that timm's filters do not resample it."""

    pos_embed = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _rename_with_timm(model: nn.Module, state: State, name: str, path: Path) -> State:
    """Rename by timm's own checkpoint filters, some of which print or warn."""
    if isinstance(model, beit.Beit):  # timm only resamples them
        return {k: v for k, v in state.items() if "relative_position_index" not in k}
    given = dict(state)
    if CLIP_PATCHES in given:
        given = {f"visual.{key}": value for key, value in given.items()}
    rename: Callable[..., Any] = eva.checkpoint_filter_fn
    if not isinstance(model, eva.Eva):
        rename = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
        if any(map(DINOV2_NAMES.search, given)):  # which timm tells by its mask token
            given.setdefault("mask_token", state["patch_embed.proj.weight"])
    with (
        explained(lambda e: WeightsError(f"{path.name!r} does not fit {name!r}: {first_line(e)}")),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return cast(State, rename(given, cast(Any, _WithoutPositions(model))))


def _check_patches(model: Any, state: State, name: str, path: Path) -> None:
    """Raise unless a file's patches have the model's size; timm would resample them."""
    key = patch_embedding(state)
    weight = state[key] if key is not None else None
    if weight is None or not 2 <= weight.ndim <= 4:
        shape = None if weight is None else list(weight.shape)
        raise WeightsError(f"{path.name!r}: {key!r} has shape {shape}; it must embed patches.")
    _, channels, height, width = model.patch_embed.proj.weight.shape
    if weight.ndim == 4 and tuple(weight.shape[2:]) != (height, width):
        raise WeightsError(
            f"{path.name!r} was trained with patches of {weight.shape[2]} x {weight.shape[3]} "
            f"pixels, {name!r} has {height} x {width}. Name the model of that patch size."
        )
    values = weight[0].numel()
    if weight.ndim < 4 and values != channels * height * width:
        raise WeightsError(
            f"{path.name!r} was trained with patches of {values} values, {name!r} has {channels} "
            f"channels of {height} x {width} pixels. Name the model of that patch size, or the "
            f"number of channels with {option('in_chans')}."
        )


def _check_last_layers(state: State, path: Path) -> None:
    """Raise if there are layers between features and head, which timm's filters drop."""
    key = next((key for key in state if "pre_logits" in key), None)
    if key is not None and any(other.startswith(HEADS) for other in state):
        raise WeightsError(
            f"{path.name!r} has a layer before its head, {key!r}, which timm's models have "
            f"not. Load it without its head: {option('num_classes', 0)}."
        )


_ONE_LAYER = re.compile(r"(\w+\.)?(weight|bias)")


def _with_plain_heads(state: State, path: Path) -> State:
    """Rename the linear layer of a head with dropout to the name of a plain linear head."""
    renamed = dict(state)
    for head in HEADS:
        names = [key.removeprefix(head) for key in state if key.startswith(head)]
        parents = {name.rpartition(".")[0] for name in names}
        if len(parents) > 1 or not all(map(_ONE_LAYER.fullmatch, names)):
            raise WeightsError(
                f"{path.name!r} has a head of other layers than one linear one "
                f"({', '.join(sorted(names)[:4])}). Load it without its head: "
                f"{option('num_classes', 0)}."
            )
        for name in names:
            renamed[head + name.rpartition(".")[2]] = renamed.pop(head + name)
        if f"{head}weight" in renamed:  # one without a bias adds nothing
            weight = renamed[f"{head}weight"]
            renamed.setdefault(f"{head}bias", weight.new_zeros(weight.shape[:1]))
    return renamed
