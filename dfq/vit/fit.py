"""Strict loading of renamed weights into a timm model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfq.argument_names import option
from dfq.errors import WeightsError
from dfq.vit.names import State
from dfq.vit.positions import POSITION_TABLES, adapt_positions, prefix_entries
from dfq.vit.translate import HEADS

ADVICE = "Name the model that the weights were trained with."


def load_into(model: nn.Module, state: State, *, name: str, path: Path, resize: bool) -> None:
    """Load weights under timm's names (:func:`dfq.vit.translate.translate`) strictly.

    ``resize``: the caller gave the image size, so position embeddings of another size are
    resampled.

    Raises:
        WeightsError: the weights are of another architecture or another image size.
    """
    own, state = model.state_dict(), dict(state)
    for key in sorted(own.keys() & state.keys()):
        if own[key].is_floating_point() and not state[key].is_floating_point():
            raise WeightsError(
                f"{path.name!r}: {key!r} is {state[key].dtype}; weights are floating-point numbers."
            )
    _check_architecture(model, own, state, name, path)
    for key in sorted(own.keys() & state.keys()):
        if key.endswith(POSITION_TABLES):
            state[key] = adapt_positions(
                model, key, state[key], name=name, path=path, resize=resize
            )
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        raise WeightsError(_mismatch(own, state, missing, unknown, shapes, name, path))
    model.load_state_dict(state)


def _check_architecture(model: Any, own: State, state: State, name: str, path: Path) -> None:
    """Raise if names and shapes show another architecture: width, depth or prefix tokens."""
    for theirs, ours in _architecture_facts(model, own, state):
        if theirs != ours:
            raise WeightsError(
                f"{path.name!r} holds weights of another architecture than {name!r}: it has "
                f"{theirs}, {name!r} has {ours}. {ADVICE}"
            )
    positions, expected = state.get("pos_embed"), own.get("pos_embed")
    before = prefix_entries(model)
    if positions is None or expected is None or positions.ndim != 3 or not before:
        return
    if positions.shape[1] == expected.shape[1] - before:
        raise WeightsError(
            f"The position embedding of {path.name!r} has {positions.shape[1]} entries, one a "
            f"patch; {name!r} has {before} more, for tokens before the patches. {ADVICE}"
        )


_LAYER_SCALE = re.compile(r"blocks\.\d+\.(ls1\.gamma|gamma_1)$")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _architecture_facts(model: Any, own: State, state: State) -> Iterator[tuple[str, str]]:
    """Yield properties of the architecture, in words: the file's and the model's."""
    theirs, ours = (s.get("patch_embed.proj.weight") for s in (state, own))
    if theirs is not None and ours is not None and theirs.ndim == ours.ndim:
        yield f"a width of {theirs.shape[0]}", f"a width of {ours.shape[0]}"
        yield f"{theirs.shape[1]} channels", f"{ours.shape[1]} channels"
    depth = len({match[1] for match in map(_BLOCK.match, state) if match})
    yield f"{depth} blocks", f"{len(model.blocks)} blocks"
    for key, one in (("cls_token", "class token"), ("dist_token", "distillation token")):
        yield _presence(key in state, one), _presence(own.get(key) is not None, one)
    yield f"{_count(state.get('reg_token'))} registers", f"{_count(own.get('reg_token'))} registers"
    yield _layer_scale(state), _layer_scale(own)


def _presence(is_there: bool, what: str) -> str:
    return what if is_there else f"no {what}"


def _layer_scale(state: State) -> str:
    return _presence(any(map(_LAYER_SCALE.match, state)), "layer scale")


def _count(token: Tensor | None) -> int:
    return 0 if token is None or token.ndim < 2 else token.shape[-2]


def _mismatch(
    own: State,
    state: State,
    missing: list[str],
    unknown: list[str],
    shapes: list[str],
    name: str,
    path: Path,
) -> str:
    heads = all(k.startswith(HEADS) for k in (*shapes, *missing, *unknown))
    theirs, asked = (len(s.get("head.weight", ())) for s in (state, own))
    if heads and theirs and asked and theirs != asked:
        return (
            f"{path.name!r} has a head of {theirs} classes, the model was asked for {asked}. "
            f"Use {option('num_classes', theirs)}."
        )
    if heads and not theirs:
        return (
            f"{path.name!r} has no head of {asked} classes. Load it without one: "
            f"{option('num_classes', 0)}."
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
    return "; ".join(parts) + f". {ADVICE}"
