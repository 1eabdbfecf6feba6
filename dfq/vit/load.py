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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from dfq.vit.fit import load_into
from dfq.vit.formats import read_config
from dfq.vit.modules import ViT
from dfq.vit.options import (
    ModelOptions,
    checked_options,
    norms_of,
    pool_keywords,
    size_flag,
    told,
)
from dfq.vit.preprocessing import overridden
from dfq.vit.saved import is_saved, read_saved
from dfq.vit.structure import SUPPORTED, unwrapped
from dfq.vit.translate import translate
from dfq.vit.weights import read_weights, weights_in

ALIASES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
}

LOCAL = "local-dir:"
"""Before the path of a folder that timm saved (``timm.models.save_for_hf``)."""


@dataclass(frozen=True)
class LoadedModel:
    """A float32 ViT, how its inputs are made, and what it is called.

    ``name`` is what the caller asked for, ``timm_name`` timm's name with the pretrained
    tag where there is one; ``notes`` are what the caller should be told of its weights.
    """

    name: str
    timm_name: str
    vit: ViT
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()

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
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_range: Sequence[float] | None = None,
) -> LoadedModel:
    """Load a ViT by name or take one in memory, which is left unmodified.

    Args:
        model: ``"demo"``, an alias (``vit_base``), a timm name with or without a
            pretrained tag, a ``hf-hub:`` address, ``local-dir:`` and a folder that timm saved, a
            directory that :func:`dfq.distill` wrote, or a timm module.
        weights: a safetensors or torch file to load instead of pretrained weights.
        num_classes: classes of the head, 0 for none; told from ``weights`` where left out.
        img_size: side of the square input in pixels, or its height and width; wins over
            timm's data config.  Position embeddings of another size are resampled.
        in_chans: channels of the input; told from ``weights`` where left out.
        global_pool: ``token``, ``avg`` or ``map``; told from ``weights`` where left out and
            their norms show it.
        mean, std: per channel, in the range of pixels / 255; win over timm's data config.
        input_range: the lowest and the highest value before normalisation, in the units of mean
            and std; by default (0, 1), of pixels / 255.  With another range, a mean and a std that
            are left out are 0 and 1: values are given as the network takes them.

    Raises:
        UnknownModelError, UnsupportedModelError, WeightsError, PretrainedError,
        SettingError: as their names say.
    """
    options = checked_options(num_classes, img_size, in_chans, global_pool)
    loaded = _load(model, weights, options)
    channels = loaded.vit.arch.in_channels
    preprocessing = overridden(loaded.preprocessing, channels, mean, std, input_range)
    return dataclasses.replace(loaded, preprocessing=preprocessing)


def _load(model: str | nn.Module, weights: str | Path | None, options: ModelOptions) -> LoadedModel:
    """A model with its own preprocessing."""
    if isinstance(model, nn.Module):
        return _from_module(unwrapped(model), weights, options)
    if is_saved(model):
        return _from_directory(Path(model), weights, options)
    name = ALIASES.get(model, model)
    notes: tuple[str, ...] = ()
    if name == "demo":
        return _demo(weights, options)
    if weights is None and name.startswith(LOCAL):
        weights = _weights_of(name)
    if weights is not None:
        timm_model, notes = _from_file(name, Path(weights), options)
    else:
        timm_model = _pretrained(name, options)
    vit = convert(timm_model, name)
    timm_name = _timm_name(name, timm_model, pretrained=weights is None)
    return LoadedModel(model, timm_name, vit, _preprocessing(timm_model), notes)


def _weights_of(name: str) -> Path:
    folder = Path(name.removeprefix(LOCAL))
    if name == LOCAL or not folder.is_dir():
        raise UnknownModelError(
            f"{name!r} names no folder. Give the path of one that timm saved after {LOCAL!r}."
        )
    return weights_in(folder)


def _timm_name(name: str, model: nn.Module, *, pretrained: bool) -> str:
    """timm's name of a model, with the tag of its pretrained weights."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if name.startswith(LOCAL):
        return str(config.get("architecture", name))
    tag = config.get("tag", "") if pretrained else ""
    return f"{split_model_name_tag(name)[0]}.{tag}" if tag and ":" not in name else name


def _from_module(
    model: nn.Module,
    weights: str | Path | None,
    options: ModelOptions,
) -> LoadedModel:
    if weights is not None:
        raise SettingError("weights goes with a model's name; a module has its own weights.")
    name = module_name(model)
    vit = convert(model, name)
    options.check_same(vit.arch, "the module in memory")
    return LoadedModel(name, name, vit, _preprocessing(model))


def _from_directory(
    path: Path,
    weights: str | Path | None,
    options: ModelOptions,
) -> LoadedModel:
    if weights is not None:
        raise SettingError(
            f"{str(path)!r} is a model with weights of its own; leave --weights out."
        )
    model, timm_name, prepared = read_saved(path)
    vit = convert(model, str(path))
    options.check_same(vit.arch, repr(str(path)))
    return LoadedModel(path.name, timm_name, vit, prepared)


def module_name(model: nn.Module) -> str:
    """What a module in memory is called: timm's name of its architecture, or its class."""
    model = unwrapped(model)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def _demo(
    weights: str | Path | None,
    options: ModelOptions,
) -> LoadedModel:
    args = dict(demo.MODEL_ARGS)
    side = args["img_size"]
    if options.img_size not in (None, (side, side)):
        raise SettingError(
            f"--img-size {size_flag(options.img_size)}: the demo model takes {side} pixels."
        )
    path = demo.WEIGHTS if weights is None else Path(weights)
    options = dataclasses.replace(options, img_size=None)
    timm_model, notes = _with_weights("demo", path, options, partial(timm.create_model, **args))
    preprocessing = Preprocessing(demo.MEAN, demo.STD)
    return LoadedModel("demo", "demo", convert(timm_model, "demo"), preprocessing, notes)


def _from_file(name: str, path: Path, options: ModelOptions) -> tuple[nn.Module, tuple[str, ...]]:
    if ":" not in name:
        _check_known(name)
    arch = name if ":" in name else split_model_name_tag(name)[0]
    return _with_weights(name, path, options, partial(_reach, name, arch, False))


def _with_weights(
    name: str, path: Path, options: ModelOptions, create: Callable[..., nn.Module]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that ``create`` makes of keywords of timm's, with a file's weights, and notes."""
    keywords: dict[str, Any] = {} if options.in_chans is None else {"in_chans": options.in_chans}
    with torch.device("meta"):
        outline = create(**keywords)
    options.check_size(describe(outline, name))
    headless = options.num_classes == 0
    found = translate(outline, read_weights(path), name=name, path=path, headless=headless)
    keywords |= told(outline, found.state, options, path)
    if options.img_size is not None:
        keywords["img_size"] = options.img_size
    model = create(**keywords)
    load_into(model, found.state, name=name, path=path, resize=options.img_size is not None)
    return model, found.notes


def _pretrained(name: str, options: ModelOptions) -> nn.Module:
    if ":" not in name:
        _check_known(name)
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if config is None or not config.has_weights:
            raise PretrainedError(
                f"timm has no pretrained weights for {name!r}. Give a file of weights with "
                "--weights, or a name with a tag from `dfq models`."
            )
        if options.num_classes not in (None, 0, config.num_classes):
            raise WeightsError(
                f"The pretrained weights of {name!r} have {config.num_classes} classes, not "
                f"{options.num_classes}. Leave --num-classes out, or give your own --weights."
            )
    with torch.device("meta"):
        outline: Any = _reach(name, name, False)
    arch = describe(outline, name)
    options.check_size(arch)
    if options.in_chans not in (None, arch.in_channels):
        raise WeightsError(
            f"The pretrained weights of {name!r} take {arch.in_channels} channels, not "
            f"{options.in_chans}. Leave --in-chans out, or give your own --weights."
        )
    kwargs: dict[str, Any] = {"num_classes": 0} if options.num_classes == 0 else {}
    if options.img_size is not None:
        kwargs["img_size"] = options.img_size
    if options.global_pool is not None:
        kwargs |= pool_keywords(outline, options.global_pool, norms_of(outline))
        if "map" in (options.global_pool, outline.global_pool) and "global_pool" in kwargs:
            raise WeightsError(
                f"The pretrained weights of {name!r} are pooled by {outline.global_pool!r} and "
                f"cannot be pooled by {options.global_pool!r}.",
                "Leave --global-pool out.",
            )
    return _reach(name, name, True, **kwargs)


def _reach(name: str, arch: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        with _fail_fast_offline():
            return _create(arch, pretrained, **kwargs)
    except KeyError as error:
        if ":" not in name:
            raise
        raise UnknownModelError(
            f"{name!r} has no description of a timm model in its config.json ({error} is missing); "
            "models of Transformers are not taken. Look for the same model in `dfq models`."
        ) from error
    except (OSError, RuntimeError) as error:
        if name.startswith(LOCAL):
            raise UnknownModelError(f"{name!r} is no folder that timm saved: {error}.") from error
        if "Error(s) in loading state_dict" in str(error):
            raise _of_another_shape(name, error) from error
        if isinstance(error, RuntimeError) and "client" not in str(error):
            raise
        raise _unreachable(name, error) from error
    except ValueError as error:
        what = (
            "folder that timm saved" if name.startswith(LOCAL) else "model of the Hugging Face hub"
        )
        raise UnknownModelError(f"{name!r} is not a {what}: {error}") from error


def _of_another_shape(name: str, error: Exception) -> WeightsError:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return WeightsError(
        f"The pretrained weights of {name!r} do not fit what was asked for "
        f"({lines[0] if lines else error!s:.200}). Leave --num-classes, --img-size and "
        "--global-pool out."
    )


def _unreachable(name: str, error: Exception) -> PretrainedError:
    reason = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
    return PretrainedError(
        f"The pretrained weights of {name!r} cannot be downloaded and are not in the local "
        f"Hugging Face cache ({reason}). Connect to the network, or give a file of weights "
        "with --weights FILE."
    )


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, AssertionError) as error:
        raise UnsupportedModelError(
            f"{name!r} does not take {kwargs}: {error}. Supported: {SUPPORTED}."
        ) from error
    return model


def _check_known(name: str) -> None:
    """Refuse unknown names and other kinds of models before anything is downloaded."""
    arch = get_arch_name(name)
    if not timm.is_model(arch):
        if "architecture" in read_config(Path(name)):
            raise UnknownModelError(
                f"{name!r} is a folder that timm saved. Name it {LOCAL}{name} to load it."
            )
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
        describe(timm.create_model(arch), name)


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
