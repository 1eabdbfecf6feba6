"""Names of tensors in files: what training puts before them, and formats that are not timm's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dfq.errors import WeightsError

State = dict[str, Tensor]

WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Names that wrappers of a layer or a model put before those of its parts."""

COUNTERS = ("n_averaged", "num_updates")
"""Ends of the names that averaging keeps beside the weights."""

AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
"""What the prefix of averaged weights has in it."""

TRUNK = "visual.trunk."
"""Where open_clip keeps a timm model; its projection is in ``visual.head``."""

CLIP_PATCHES = "conv1.weight"
"""Patch embedding of CLIP's own image towers, a name of convolutional networks too."""

CLIP_POSITIONS = "positional_embedding"
"""What tells the two apart."""

PATCH_EMBEDDINGS = (
    "patch_embed.proj.weight",
    "patch_embed.projection.weight",
    "beit3.vision_embed.proj.weight",
)
"""Names of patch embeddings in the other formats that timm translates."""

Kinds = tuple[tuple[str, str, str], ...]

FROM_TIMM = "Take the same model from timm (`dfq models`), or save its weights under timm's names"

FOREIGN: Kinds = (
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
"""Formats of others: a pattern of their names, whose they are, and what to do."""

IN_PARTS: Kinds = (
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
"""Weights whose values are not yet those of plain layers."""


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, and what a caller should be told about them."""

    state: State
    notes: tuple[str, ...] = ()


def of_one_model(state: State, path: Path, *, headless: bool = False) -> Tensors:
    """The tensors of the one ViT in a state dict, without what stands before their names.

    ``headless``: features alone are wanted, so heads beside the ViT may be left out.

    Raises:
        WeightsError: the names are of another format than timm's, of several models, or
            of a model around the ViT.
    """
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    prefix = _prefix(state, path)
    inside = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith(COUNTERS)
    }
    refuse_foreign(inside, path)
    if patch_embedding(inside) is None:
        raise WeightsError(
            f"{path.name!r} has no patch embedding under a name that timm knows; its names are "
            f"{_some(state)}. Save the state dict of a timm model."
        )
    beside = [key for key in state if not key.startswith(prefix) and not key.endswith(COUNTERS)]
    if headless:
        return Tensors(inside)
    if prefix.endswith(TRUNK):
        return _with_projection(inside, state, prefix.removesuffix("trunk."), path)
    if CLIP_PATCHES in inside:
        notes = (_projected(path, inside["proj"].shape[-1]),) if "proj" in inside else ()
        return Tensors(inside, notes)
    if not beside:
        return Tensors(inside)
    if not any(key.startswith("head") for key in inside):
        raise WeightsError(
            f"{path.name!r} has {_some(beside)} beside the model, whose names begin with "
            f"{prefix!r}; timm's model has no place for them. Leave them out with --num-classes 0, "
            "or save the state dict of a timm model with its head."
        )
    return Tensors(
        inside, (f"{path.name!r}: of {prefix!r} alone; {_some(beside)} beside it are not used.",)
    )


def _with_projection(inside: State, state: State, tower: str, path: Path) -> Tensors:
    """open_clip's projection behind a timm model, as the head that it is."""
    names = [key.removeprefix(f"{tower}head.") for key in state if key.startswith(f"{tower}head.")]
    if not names:
        return Tensors(inside)
    if not set(names) <= {"proj.weight", "proj.bias"}:
        raise WeightsError(
            f"{path.name!r} has a projection of other layers than one linear one "
            f"({', '.join(sorted(names)[:4])}). Load it without: --num-classes 0."
        )
    weight = state[f"{tower}head.proj.weight"]
    bias = state.get(f"{tower}head.proj.bias", weight.new_zeros(len(weight)))
    head = {"head.weight": weight, "head.bias": bias}
    return Tensors({**inside, **head}, (_projected(path, len(weight)),))


def _projected(path: Path, width: int) -> str:
    return (
        f"{path.name!r}: the image tower's projection to {width} values is loaded as the head; "
        "--num-classes 0 leaves it out."
    )


def refuse_foreign(keys: Collection[str], path: Path) -> None:
    """Raise :class:`WeightsError` if names are those of a format that is known to be another's,
    or of weights in parts."""
    for kinds, verb in ((IN_PARTS, "has"), (FOREIGN, "has the names of")):
        for pattern, what, advice in kinds:
            found = next((key for key in keys if re.search(pattern, key)), None)
            if found is not None:
                raise WeightsError(f"{path.name!r} {verb} {what}, such as {found!r}. {advice}.")


def _prefix(state: State, path: Path) -> str:
    """What stands before all names of the ViT, such as ``module.`` or ``teacher.backbone.``."""
    found = sorted({p for key in state if (p := _before_patches(key, state)) is not None})
    if len(found) > 1:
        averaged = [prefix for prefix in found if AVERAGED.search(prefix)]
        found = averaged if len(averaged) == 1 else found
    if len(found) > 1:
        raise WeightsError(
            f"{path.name!r} holds {len(found)} models, whose names begin with "
            f"{', '.join(map(repr, found))}. Save the tensors of the one that is meant as a file."
        )
    return found[0] if found else ""


def _before_patches(key: str, state: State) -> str | None:
    """What stands before the name of a patch embedding; None of other tensors."""
    for name in (*PATCH_EMBEDDINGS, CLIP_PATCHES):
        prefix = key.removesuffix(name)
        if prefix == key or (prefix and not prefix.endswith(".")):
            continue
        if name != CLIP_PATCHES or prefix + CLIP_POSITIONS in state:
            return prefix
    return None


def patch_embedding(state: Collection[str]) -> str | None:
    """The name of the patch embedding's weight, in whichever format; None without one."""
    return next((key for key in (*PATCH_EMBEDDINGS, CLIP_PATCHES) if key in state), None)


def _some(keys: Iterable[str]) -> str:
    listed = sorted(keys)
    more = f" and {len(listed) - 3} others" if len(listed) > 3 else ""
    return f"{', '.join(map(repr, listed[:3]))}{more}"
