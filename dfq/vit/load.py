"""From what a user names a model to a :class:`dfq.vit.ViT` with its preprocessing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import socket
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import timm
import torch
from timm.models import get_arch_name, split_model_name_tag
from torch import nn

from dfq import demo
from dfq.arguments import checked
from dfq.errors import (
    PretrainedError,
    SettingError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
    nearest,
)
from dfq.vit.architecture import CropMode, Interpolation, Preprocessing, to_json
from dfq.vit.convert import convert
from dfq.vit.describe import describe
from dfq.vit.modules import ViT
from dfq.vit.preprocessing import overridden
from dfq.vit.saved import is_saved, read_saved
from dfq.vit.structure import SUPPORTED, unwrapped
from dfq.vit.weights import classes_in, load_into, read_weights

ALIASES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
}


MOST_PATCHES = 1 << 16
"""Of an image: attention scores of a single head then take 17 GB."""


@dataclass(frozen=True)
class LoadedModel:
    """A float32 ViT, how its inputs are made, and what it is called.

    ``name`` is what the caller asked for, ``timm_name`` timm's name with the pretrained
    tag where there is one.
    """

    name: str
    timm_name: str
    vit: ViT
    preprocessing: Preprocessing

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture, the preprocessing and every weight."""
        return fingerprint(self.vit, self.preprocessing)


def fingerprint(vit: ViT, preprocessing: Preprocessing) -> str:
    """SHA-256 (hex) over the architecture, the preprocessing and every weight."""
    digest = hashlib.sha256()
    facts = [to_json(vit.arch), to_json(preprocessing)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@checked
def load_model(
    model: str | nn.Module,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_range: Sequence[float] | None = None,
) -> LoadedModel:
    """Load a ViT by name or take one in memory, which is left unmodified.

    Args:
        model: ``"demo"``, an alias (``vit_base``), a timm name with or without a
            pretrained tag, a ``hf-hub:`` address, a directory that :func:`dfq.distill` wrote, or
            a timm module.
        weights: a safetensors or torch file to load instead of pretrained weights.
        num_classes: classes of the head, 0 for none; told from ``weights`` where left out.
        img_size: side of the square input in pixels; wins over timm's data config.
        mean, std: per channel, in the range of pixels / 255; win over timm's data config.
        input_range: the lowest and the highest value before normalisation, in the units of mean
            and std; by default (0, 1), of pixels / 255.  With another range, a mean and a std that
            are left out are 0 and 1: values are given as the network takes them.

    Raises:
        UnknownModelError, UnsupportedModelError, WeightsError, PretrainedError,
        SettingError: as their names say.
    """
    for flag, value, least in (("--num-classes", num_classes, 0), ("--img-size", img_size, 1)):
        if value is not None and value < least:
            raise SettingError(f"{flag} is {value}; it must be at least {least}.")
    loaded = _load(model, weights, num_classes, img_size)
    channels = loaded.vit.arch.in_channels
    preprocessing = overridden(loaded.preprocessing, channels, mean, std, input_range)
    return dataclasses.replace(loaded, preprocessing=preprocessing)


def _load(
    model: str | nn.Module,
    weights: str | Path | None,
    num_classes: int | None,
    img_size: int | None,
) -> LoadedModel:
    """A model with its own preprocessing."""
    if isinstance(model, nn.Module):
        loaded = _from_module(unwrapped(model), weights)
        arch = loaded.vit.arch
        if num_classes not in (None, arch.num_classes) or img_size not in (None, *arch.image_size):
            raise SettingError(
                f"num_classes {num_classes} and img_size {img_size} go with a model's name; the "
                f"module in memory has {arch.num_classes} classes at {arch.image_size} pixels."
            )
        return loaded
    if is_saved(model):
        return _from_directory(Path(model), weights, num_classes, img_size)
    name = ALIASES.get(model, model)
    if name == "demo":
        return _demo(weights, num_classes, img_size)
    if weights is not None:
        timm_model = _from_file(name, Path(weights), num_classes, img_size)
    else:
        timm_model = _pretrained(name, num_classes, img_size)
    config: Any = getattr(timm_model, "pretrained_cfg", None) or {}
    tag = config.get("tag", "") if weights is None else ""
    timm_name = f"{split_model_name_tag(name)[0]}.{tag}" if tag and ":" not in name else name
    vit = convert(timm_model, model)
    return LoadedModel(model, timm_name, vit, _preprocessing(timm_model))


def _from_module(model: nn.Module, weights: str | Path | None) -> LoadedModel:
    if weights is not None:
        raise SettingError("weights goes with a model's name; a module has its own weights.")
    name = module_name(model)
    vit = convert(model, name)
    return LoadedModel(name, name, vit, _preprocessing(model))


def _from_directory(
    path: Path,
    weights: str | Path | None,
    num_classes: int | None,
    img_size: int | None,
) -> LoadedModel:
    model, timm_name, prepared = read_saved(path)
    vit = convert(model, str(path))
    size, classes = vit.arch.image_size, vit.arch.num_classes
    if weights is not None or img_size not in (None, *size) or num_classes not in (None, classes):
        raise SettingError(
            f"{str(path)!r} is a model with weights, {classes} classes and {size} pixels of its "
            "own; leave --weights, --num-classes and --img-size out."
        )
    return LoadedModel(path.name, timm_name, vit, prepared)


def module_name(model: nn.Module) -> str:
    """What a module in memory is called: timm's name of its architecture, or its class."""
    model = unwrapped(model)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def _demo(
    weights: str | Path | None,
    num_classes: int | None,
    img_size: int | None,
) -> LoadedModel:
    args = dict(demo.MODEL_ARGS)
    if img_size is not None and img_size != args["img_size"]:
        raise SettingError(
            f"--img-size {img_size}: the demo model takes {args['img_size']} pixels."
        )
    path = demo.WEIGHTS if weights is None else Path(weights)
    state = read_weights(path)
    classes = classes_in(state) if num_classes is None else num_classes
    args["num_classes"] = args["num_classes"] if classes is None else classes
    if classes == 0:
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    timm_model = timm.create_model(**args)
    load_into(timm_model, state, name="demo", path=path, resize=False)
    preprocessing = Preprocessing(demo.MEAN, demo.STD)
    return LoadedModel("demo", "demo", convert(timm_model, "demo"), preprocessing)


def _from_file(name: str, path: Path, num_classes: int | None, img_size: int | None) -> nn.Module:
    _refuse_early(name, img_size)
    state = read_weights(path)
    classes = num_classes if num_classes is not None else classes_in(state)
    if classes is None and not any(key.startswith("head") for key in state):
        classes = 0
    if classes == 0:
        state = {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist."))}
    arch = name if ":" in name else split_model_name_tag(name)[0]
    kwargs: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    model = _reach(name, arch, False, img_size, **kwargs)
    load_into(model, state, name=name, path=path, resize=img_size is not None)
    return model


def _pretrained(name: str, num_classes: int | None, img_size: int | None) -> nn.Module:
    _refuse_early(name, img_size)
    if ":" not in name:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if config is None or not config.has_weights:
            raise PretrainedError(
                f"timm has no pretrained weights for {name!r}. Give a file of weights with "
                "--weights, or a name with a tag from `dfq models`."
            )
        if num_classes not in (None, 0, config.num_classes):
            raise WeightsError(
                f"The pretrained weights of {name!r} have {config.num_classes} classes, not "
                f"{num_classes}. Leave --num-classes out, or give your own --weights."
            )
    kwargs: dict[str, Any] = {"num_classes": 0} if num_classes == 0 else {}
    return _reach(name, name, True, img_size, **kwargs)


def _reach(
    name: str, arch: str, pretrained: bool, img_size: int | None, **kwargs: Any
) -> nn.Module:
    try:
        with _fail_fast_offline():
            return _create(arch, pretrained, img_size, **kwargs)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "client" not in str(error):
            raise
        raise _unreachable(name, error) from error
    except ValueError as error:
        raise UnknownModelError(
            f"{name!r} is not a model of the Hugging Face hub: {error}"
        ) from error


def _unreachable(name: str, error: Exception) -> PretrainedError:
    reason = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
    return PretrainedError(
        f"The pretrained weights of {name!r} cannot be downloaded and are not in the local "
        f"Hugging Face cache ({reason}). Connect to the network, or give a file of weights "
        "with --weights FILE."
    )


def _create(name: str, pretrained: bool, img_size: int | None, **kwargs: Any) -> nn.Module:
    if img_size is not None:
        kwargs["img_size"] = img_size
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{name!r} does not take {sorted(kwargs)}: {error}. Supported: {SUPPORTED}."
        ) from error
    return model


def _refuse_early(name: str, img_size: int | None) -> None:
    """Refuse unknown names and other kinds of models before anything is downloaded."""
    if ":" in name:
        return
    arch = get_arch_name(name)
    if not timm.is_model(arch):
        known = [*ALIASES, "demo", *timm.list_models("*vit*"), *timm.list_models("*eit*")]
        raise UnknownModelError(
            f"Unknown model {name!r}.{nearest(arch, known)} "
            "`dfq models` lists the names; `dfq models FILTER` searches timm's."
        )
    tag = split_model_name_tag(name)[1]
    tags = {n.partition(".")[2] for n in timm.list_pretrained(f"{arch}.*")}
    if tag and tag not in tags:
        raise UnknownModelError(
            f"{arch!r} has no pretrained tag {tag!r}; it has {sorted(tags) or 'none'}."
        )
    with torch.device("meta"):
        height, width = describe(timm.create_model(arch), name).patch_size
    if img_size is None:
        return
    if img_size < max(height, width):
        raise SettingError(
            f"--img-size {img_size} is less than a patch of {max(height, width)} pixels."
        )
    patches = (img_size // height) * (img_size // width)
    if patches > MOST_PATCHES:
        raise SettingError(
            f"--img-size {img_size} makes {patches} patches of {height} x {width} pixels; the most "
            f"are {MOST_PATCHES}."
        )


@contextlib.contextmanager
def _fail_fast_offline() -> Iterator[None]:
    """Spare the hub's retries (a minute) where its name cannot even be resolved."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    if not before and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _preprocessing(model: nn.Module) -> Preprocessing:
    """What timm's data config of a model says."""
    config = timm.data.resolve_model_data_config(model)
    return Preprocessing(
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        interpolation=_known(config["interpolation"], Interpolation, "bicubic"),
        crop_pct=float(config["crop_pct"]),
        crop_mode=_known(config.get("crop_mode"), CropMode, "center"),
    )


def _known(value: Any, choices: Any, otherwise: str) -> Any:
    return value if value in get_args(choices) else otherwise
