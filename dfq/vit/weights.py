"""Weights files: safetensors, and torch files read without running code from them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import beit, clean_state_dict, deit, eva, vision_transformer
from torch import Tensor, nn

from dfq.errors import WeightsError
from dfq.failures import explained, first_line
from dfq.vit.convert import check_finite

ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Where training checkpoints keep weights, in the order in which timm looks for them."""


_LAYER_SCALES = re.compile(r"^(blocks\.\d+\.)gamma_([12])$")
"""Names of layer scale in DeiT-III's published weights."""

POSITION_TABLES = ("pos_embed", "relative_position_bias_table")
"""Ends of the names of parameters whose length follows from the image size."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict; timm's training checkpoints are unwrapped, EMA weights first.

    Raises:
        WeightsError: the file is missing, damaged, or holds no state dict.
    """
    if not path.is_file():
        raise WeightsError(f"Weights file {str(path)!r} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise WeightsError(f"Weights file {str(path)!r} is empty.")
    with path.open("rb") as file:
        start = file.read(9)
    is_torch = start[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    content: Any = _read_torch(path) if is_torch else _read_safetensors(path)
    for entry in ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        keys = f" (it has {sorted(map(str, content))[:6]})" if isinstance(content, dict) else ""
        raise WeightsError(f"{str(path)!r} holds no model weights{keys}; expected a state dict.")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for key, value in tensors.items():
        if (
            value.layout != torch.strided
            or value.is_meta
            or value.is_quantized
            or not value.numel()
        ):
            raise WeightsError(f"{str(path)!r}: {key!r} is empty or no plain tensor of numbers.")
        if value.is_complex():
            raise WeightsError(
                f"{str(path)!r}: {key!r} is {value.dtype}; weights are real numbers."
            )
    check_finite(tensors)
    return dict(clean_state_dict(tensors))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{str(path)!r} is not a whole safetensors or torch file ({error}). "
            "Check that the download is complete."
        ) from error


def _read_torch(path: Path) -> Any:
    def explain(error: Exception) -> WeightsError:
        if "Weights only load failed" in str(error):
            return WeightsError(
                f"{str(path)!r} holds more than weights, which is never unpickled. Save "
                "model.state_dict(), or use safetensors."
            )
        return WeightsError(
            f"{str(path)!r} is not a whole torch file ({first_line(error)}). Check that the "
            "download is complete."
        )

    trusted = torch.serialization.safe_globals([argparse.Namespace])
    with explained(explain), trusted, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def classes_in(state: dict[str, Tensor]) -> int | None:
    """How many classes the weights' head has, where it can be told."""
    head = state.get("head.weight", state.get("head.fc.weight"))
    return head.shape[0] if head is not None and head.ndim == 2 else None


def load_into(
    model: nn.Module, state: dict[str, Tensor], *, name: str, path: Path, resize: bool
) -> None:
    """Load weights strictly, in timm's own formats.

    ``resize`` allows position embeddings to be resampled to the model's image size.

    Raises:
        WeightsError: the weights are of another architecture.
    """
    own = model.state_dict()
    for key in sorted(own.keys() & state.keys()):
        if own[key].is_floating_point() and not state[key].is_floating_point():
            raise WeightsError(f"{path.name!r}: {key!r} is {state[key].dtype}; weights are floats.")
    _check_patches(own, state, name, path)
    if any(key.endswith("ls1.gamma") for key in own):
        state = {_LAYER_SCALES.sub(r"\1ls\2.gamma", k): v for k, v in state.items()}
    if not resize:
        for key in sorted(own.keys() & state.keys()):
            if key.endswith(POSITION_TABLES):
                _check_size(own[key], state[key], name, path)
    with (
        explained(lambda e: WeightsError(f"{path.name!r} does not fit {name!r}: {first_line(e)}")),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        state = _filter(model)(dict(state), cast(Any, model))
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        raise WeightsError(_mismatch(own, state, missing, unknown, shapes, name, path))
    model.load_state_dict(state)


def _filter(model: nn.Module) -> Callable[..., Any]:
    """timm's own translation of the formats in which weights of such models circulate.

    Some print or warn on the way.
    """
    if isinstance(model, deit.VisionTransformerDistilled):
        return partial(deit.checkpoint_filter_fn, adapt_layer_scale=True)
    homes = {beit.Beit: beit, eva.Eva: eva}
    home: Any = homes.get(type(model), vision_transformer)
    translate: Callable[..., Any] = home.checkpoint_filter_fn
    return translate


def _check_patches(own: dict[str, Tensor], state: dict[str, Tensor], name: str, path: Path) -> None:
    """Refuse weights of another patch size, or of another number of channels, before timm
    resamples them without a word."""
    key = "patch_embed.proj.weight"
    if key not in own or key not in state or state[key].ndim != 4:
        return
    (_, channels, *patch), (_, wanted, *size) = state[key].shape, own[key].shape
    if patch != size:
        raise WeightsError(
            f"{path.name!r} has patches of {patch[0]} x {patch[1]} pixels, {name!r} of {size[0]} x "
            f"{size[1]}. Name a model of that patch size."
        )
    if channels != wanted:
        raise WeightsError(
            f"{path.name!r} takes images of {channels} channels, {name!r} of {wanted}."
        )


def _check_size(own: Tensor, theirs: Tensor, name: str, path: Path) -> None:
    if own.ndim == theirs.ndim and own.shape[:-1] != theirs.shape[:-1]:
        raise WeightsError(
            f"{path.name!r} was trained at another image size than {name!r}: its position "
            f"embedding has {theirs.shape[-2]} entries, the model's {own.shape[-2]}. "
            "Name the size that the weights were trained at with --img-size."
        )


def _mismatch(
    own: dict[str, Tensor],
    state: dict[str, Tensor],
    missing: list[str],
    unknown: list[str],
    shapes: list[str],
    name: str,
    path: Path,
) -> str:
    heads = all(k.startswith(("head.", "head_dist.")) for k in shapes)
    theirs, asked = (len(s.get("head.weight", ())) for s in (state, own))
    if not missing and not unknown and heads and theirs != asked:
        return (
            f"{path.name!r} has a head of {theirs} classes, the model was asked for {asked}. "
            f"Use --num-classes {theirs}."
        )
    parts = [f"{path.name!r} holds weights of another architecture than {name!r}"]
    if shapes:
        k = shapes[0]
        parts.append(
            f"{len(shapes)} tensors differ in shape, such as {k!r}: {list(state[k].shape)} in the "
            f"file, {list(own[k].shape)} in the model"
        )
    for label, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            parts.append(f"{len(keys)} {label}, such as {', '.join(map(repr, keys[:3]))}")
    return "; ".join(parts) + ". Name the model that the weights were trained with."
