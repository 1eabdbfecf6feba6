"""Tensor names in weights files: prefixes added by training, and formats other than timm's."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from dfq.argument_names import option
from dfq.errors import WeightsError

State = dict[str, Tensor]
Key = TypeVar("Key")

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Prefixes that wrappers of layers or models add to names."""

COUNTERS = ("n_averaged", "num_updates")
"""Endings of names of counters that weight averaging stores beside the weights."""

AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
"""Pattern of the prefix of averaged weights."""

TRUNK = "visual.trunk."
"""Prefix of a timm model within open_clip, whose projection is ``visual.head``."""

CLIP_PATCHES = "conv1.weight"
"""Patch embedding of CLIP's own image towers; convolutional networks use the name too."""

CLIP_POSITIONS = "positional_embedding"
"""Present in CLIP's image towers, but not in convolutional networks."""

PATCH_EMBEDDINGS = (
    "patch_embed.proj.weight",
    "patch_embed.projection.weight",
    "beit3.vision_embed.proj.weight",
)
"""Names of patch embeddings in timm's format and others that timm converts."""

Kinds = tuple[tuple[str, str, str], ...]

FROM_TIMM = "Take the same model from timm (`dfq models`), or save its weights under timm's names"

OTHER_FORMATS: Kinds = (
    (
        r"embeddings\.patch_embeddings?\.|encoder\.layers?\.\d+\.(attention|layernorm|layer_norm)",
        "Transformers",
        FROM_TIMM,
    ),
    (
        r"(^|\.)conv_proj\.weight$|encoder_layer_\d+\.",
        "torchvision",
        FROM_TIMM,
    ),
    (r"(^|\.)layers\.\d+\.(ln1|ln2|ffn\.layers)\.", "OpenMMLab", FROM_TIMM),
    (r"(^|\.)to_patch_embedding\.", "vit-pytorch", "It has no counterpart in timm"),
    (r"^radio_model\.", "RADIO", FROM_TIMM),
    (
        r"^layers\.\d+\.(blocks|downsample)\.",
        "a model in stages, such as Swin",
        "Models with windows or stages are not supported",
    ),
    (
        r"^layer[1-4]\.\d+\.|^stages\.\d+\.|^features\.\d+\.",
        "a convolutional network",
        "Give the weights of a vision transformer",
    ),
)
"""Formats that are not supported: a pattern of names, the format, and advice."""

UNMERGED: Kinds = (
    (
        r"lora_|ia3_|modules_to_save|\.base_layer\.|^base_model\.model\.|(^|\.)adapter",
        "an adapter beside the weights",
        "Merge the adapter first (peft: model.merge_and_unload()), then save state_dict()",
    ),
    (
        r"parametrizations\.|\.weight_[gv]$",
        "parametrized weights",
        "Make them plain first (torch.nn.utils.parametrize.remove_parametrizations), then save",
    ),
    (
        r"\.weight_(orig|mask|u)$",
        "pruned or spectrally normed weights in parts",
        "Make them plain first (torch.nn.utils.prune.remove), then save",
    ),
    (
        r"\.(qweight|qzeros|SCB|weight_scale\w*|weight_zero_point|zero_point|_packed_params\S*)$"
        r"|\.absmax$|\.quant_map$",
        "quantized weights",
        "Give the weights of the float model",
    ),
)
"""Weights that are stored in parts: a pattern of names, a description, and advice."""


@dataclass(frozen=True)
class RenamedState:
    """State dict, with notes for the user about it."""

    state: State
    notes: tuple[str, ...] = ()


def rename(state: Mapping[Key, Tensor], new_name: Callable[[Key], str], path: Path) -> State:
    """Return a state dict under other names.

    Raises:
        WeightsError: two entries would get one name.
    """
    before: dict[str, Key] = {}
    for key in state:
        name = new_name(key)
        if name in before:
            raise WeightsError(
                f"{path.name!r} has two tensors for {name!r}: {before[name]!r:.100} and "
                f"{key!r:.100}. Save the state dict of the one that is meant as a file."
            )
        before[name] = key
    return {name: state[key] for name, key in before.items()}


def extract_vit(state: State, path: Path, *, headless: bool = False) -> RenamedState:
    """Extract the ViT's tensors from a state dict and remove the prefix of their names.

    ``headless``: no classifier is needed, so heads outside the ViT are ignored.

    Raises:
        WeightsError: the names are of another format than timm's, or of several models, or a
            head lies outside the ViT.
    """
    state = rename(state, lambda key: WRAPPERS.sub("", key), path)
    prefix = _prefix(state, path)
    inside = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith(COUNTERS)
    }
    check_names(inside, path)
    if patch_embedding(inside) is None:
        raise WeightsError(
            f"{path.name!r} has no patch embedding under a name that timm knows; its names are "
            f"{_abbreviate(state)}. Save the state dict of a timm model."
        )
    beside = [key for key in state if not key.startswith(prefix) and not key.endswith(COUNTERS)]
    if headless:
        return RenamedState(inside)
    if prefix.endswith(TRUNK):
        return _with_projection(inside, state, prefix.removesuffix("trunk."), path)
    if CLIP_PATCHES in inside:
        notes = (_projection_note(path, inside["proj"].shape[-1]),) if "proj" in inside else ()
        return RenamedState(inside, notes)
    if not beside:
        return RenamedState(inside)
    if not any(key.startswith("head") for key in inside):
        raise WeightsError(
            f"{path.name!r} has {_abbreviate(beside)} beside the model, whose names begin with "
            f"{prefix!r}; timm's model has no place for them. Leave them out with "
            f"{option('num_classes', 0)}, or save the state dict of a timm model with its head."
        )
    return RenamedState(
        inside,
        (f"{path.name!r}: of {prefix!r} alone; {_abbreviate(beside)} beside it are not used.",),
    )


def _with_projection(inside: State, state: State, tower: str, path: Path) -> RenamedState:
    """Add open_clip's projection as the head of the timm model."""
    names = [key.removeprefix(f"{tower}head.") for key in state if key.startswith(f"{tower}head.")]
    if not names:
        return RenamedState(inside)
    if not set(names) <= {"proj.weight", "proj.bias"}:
        raise WeightsError(
            f"{path.name!r} has a projection of other layers than one linear one "
            f"({', '.join(sorted(names)[:4])}). Load it without: {option('num_classes', 0)}."
        )
    if "head.weight" in inside:
        raise WeightsError(
            f"{path.name!r} has two heads: {f'{tower}trunk.head.weight'!r} and "
            f"{f'{tower}head.proj.weight'!r}. Load it without: {option('num_classes', 0)}."
        )
    weight = state[f"{tower}head.proj.weight"]
    bias = state.get(f"{tower}head.proj.bias", weight.new_zeros(len(weight)))
    head = {"head.weight": weight, "head.bias": bias}
    return RenamedState({**inside, **head}, (_projection_note(path, len(weight)),))


def _projection_note(path: Path, width: int) -> str:
    return (
        f"{path.name!r}: the image tower's projection to {width} values is loaded as the head; "
        f"{option('num_classes', 0)} leaves it out."
    )


def check_names(keys: Collection[str], path: Path) -> None:
    """Raise :class:`WeightsError` for names of an unsupported format or of weights in parts."""
    for kinds, verb in ((UNMERGED, "has"), (OTHER_FORMATS, "has the names of")):
        for pattern, what, advice in kinds:
            match = next((key for key in keys if re.search(pattern, key)), None)
            if match is not None:
                raise WeightsError(f"{path.name!r} {verb} {what}, such as {match!r}. {advice}.")


def _prefix(state: State, path: Path) -> str:
    """Return the prefix of all names of the ViT, such as ``module.`` or ``teacher.backbone.``."""
    prefixes = sorted({p for key in state if (p := _prefix_of(key, state)) is not None})
    if len(prefixes) > 1:
        averaged = [prefix for prefix in prefixes if AVERAGED.search(prefix)]
        prefixes = averaged if len(averaged) == 1 else prefixes
    if len(prefixes) > 1:
        raise WeightsError(
            f"{path.name!r} holds {len(prefixes)} models, with the prefixes "
            f"{', '.join(map(repr, prefixes))}. Save the tensors of one of them as a file."
        )
    return prefixes[0] if prefixes else ""


def _prefix_of(key: str, state: State) -> str | None:
    """Return the prefix of a patch embedding's name; None for other tensors."""
    for name in (*PATCH_EMBEDDINGS, CLIP_PATCHES):
        prefix = key.removesuffix(name)
        if prefix == key or (prefix and not prefix.endswith(".")):
            continue
        if name != CLIP_PATCHES or prefix + CLIP_POSITIONS in state:
            return prefix
    return None


def patch_embedding(state: Collection[str]) -> str | None:
    """Return the name of the patch embedding's weight in any known format, or None."""
    return next((key for key in (*PATCH_EMBEDDINGS, CLIP_PATCHES) if key in state), None)


def _abbreviate(keys: Iterable[str]) -> str:
    listed = sorted(keys)
    more = f" and {len(listed) - 3} others" if len(listed) > 3 else ""
    return f"{', '.join(map(repr, listed[:3]))}{more}"
