"""Loading of models by name, file or module as :class:`dfq.vit.ViT` with preprocessing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import timm
import torch
from timm.models import get_arch_name, split_model_name_tag
from torch import nn

from dfq import demo
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.catalog import ALIASES
from dfq.errors import (
    PretrainedError,
    SettingError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
    nearest,
)
from dfq.failures import explained, first_line
from dfq.vit.architecture import Preprocessing, to_json
from dfq.vit.convert import convert
from dfq.vit.describe import describe
from dfq.vit.description import data_problem
from dfq.vit.download import create_model
from dfq.vit.fit import load_into
from dfq.vit.folders import LOCAL_PREFIX, find_weights, named_folder
from dfq.vit.formats import read_config
from dfq.vit.modules import ViT
from dfq.vit.options import (
    LoadOptions,
    ModelOptions,
    infer_keywords,
    norms_of,
    pool_keywords,
    size_value,
    validate_options,
)
from dfq.vit.preprocessing import override_preprocessing
from dfq.vit.saved import is_saved, read_saved
from dfq.vit.structure import unwrapped
from dfq.vit.translate import translate
from dfq.vit.weights import read_weights


@dataclass(frozen=True)
class LoadedModel:
    """Float32 ViT with its preprocessing and names.

    ``name``: as given by the caller.  ``timm_name``: timm's name, with the pretrained tag if there
    is one.  ``notes``: remarks for the user about the weights.  ``directory``: where
    :func:`dfq.distill` wrote it, else None.
    """

    name: str
    timm_name: str
    vit: ViT
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    directory: Path | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture, the preprocessing and every weight, as they were when it
        was read first."""
        return fingerprint(self.vit, self.preprocessing)

    def frozen(self, device: torch.device | str = "cpu") -> LoadedModel:
        """Return the model on a device, in float32 and eval mode, without gradients and hooks.

        This model is not modified.  Weights that are float32 on the device already are shared.

        Raises:
            SettingError: the parameters of ``vit`` are not those of its architecture.
        """
        with torch.device("meta"):
            vit = ViT(self.vit.arch)
        state = {k: v.to(device, torch.float32) for k, v in self.vit.state_dict().items()}
        with explained(self._misfit):
            vit.load_state_dict(state, assign=True)
        return dataclasses.replace(self, vit=vit.eval().requires_grad_(False))

    def _misfit(self, error: Exception) -> SettingError:
        reason = " ".join(str(error).splitlines()[1:2]).strip() or first_line(error)
        return SettingError(
            f"The vit of the LoadedModel {self.name!r} does not fit its architecture "
            f"({reason:.160}). Load the model again with dfq.load_model."
        )


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
def load_model(model: str | nn.Module | LoadedModel, **options: Unpack[LoadOptions]) -> LoadedModel:
    """Load a ViT by name, or convert one in memory, which is not modified.

    Args:
        model: ``"demo"``, an alias (``vit_base``), a timm name with or without a
            pretrained tag, a ``hf-hub:`` address, ``local-dir:`` and a folder that timm saved, a
            directory that :func:`dfq.distill` wrote, a timm module, or a model that this function
            returned, which is returned again and takes no further arguments.
        weights: a safetensors or torch file to load instead of pretrained weights.
        num_classes: classes of the head, 0 for none; inferred from ``weights`` by default.
        img_size: side of the square input in pixels, or its height and width; overrides
            timm's data config.  Position embeddings of another size are resampled.
        in_chans: channels of the input; inferred from ``weights`` by default.
        global_pool: ``token``, ``avg`` or ``map``; inferred from the norms in ``weights`` by
            default.
        mean, std: per channel, in the range of pixels / 255; override timm's data config.
        input_range: the lowest and the highest value before normalization, in the units of mean
            and std; by default (0, 1), of pixels / 255.  With another range, mean and std default
            to 0 and 1: values are passed to the network as they are.

    Raises:
        UnknownModelError, UnsupportedModelError, WeightsError, PretrainedError,
        SettingError: as their names say.
    """
    if isinstance(model, LoadedModel):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise SettingError(
                f"{', '.join(given)} cannot be given beside the LoadedModel {model.name!r}, which "
                "has its own. Leave out, or give to dfq.load_model with the model's name."
            )
        return model
    shape = validate_options(
        options.get("num_classes"),
        options.get("img_size"),
        options.get("in_chans"),
        options.get("global_pool"),
    )
    own = _load(model, options.get("weights"), shape)
    preprocessing = override_preprocessing(
        own.preprocessing,
        own.vit.arch.in_channels,
        options.get("mean"),
        options.get("std"),
        options.get("input_range"),
    )
    return dataclasses.replace(own, preprocessing=preprocessing)


def _load(model: str | nn.Module, weights: str | Path | None, options: ModelOptions) -> LoadedModel:
    """Load a model with its own preprocessing."""
    if isinstance(model, nn.Module):
        return _from_module(unwrapped(model), weights, options)
    if is_saved(model):
        return _from_directory(Path(model), weights, options)
    name = ALIASES.get(model, model)
    notes: tuple[str, ...] = ()
    if name == "demo":
        return _demo(weights, options)
    if weights is None and name.startswith(LOCAL_PREFIX):
        weights = find_weights(named_folder(name))
    if weights is not None:
        timm_model, notes = _from_file(name, Path(weights), options)
    else:
        timm_model = _pretrained(name, options)
    vit = convert(timm_model, name)
    timm_name = _timm_name(name, timm_model, pretrained=weights is None)
    return LoadedModel(model, timm_name, vit, _preprocessing(timm_model, name), notes)


@dataclass(frozen=True)
class Structure:
    """timm model, on the meta device unless its weights were given, and its preprocessing."""

    model: nn.Module
    timm_name: str
    preprocessing: Preprocessing


def load_structure(
    name: str,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
) -> Structure:
    """Build a timm model by name, without weights and without checking whether dfq supports it.

    The arguments are those of :func:`load_model`.  ``weights`` are read and compared with the
    model; they and the other arguments need a supported model.

    Raises:
        UnknownModelError, UnsupportedModelError, WeightsError, PretrainedError,
        SettingError: as their names say.
    """
    options = validate_options(num_classes, img_size, in_chans, global_pool)
    model = ALIASES.get(name, name)
    if is_saved(model):
        _from_directory(Path(model), weights, options)  # compares the options with it
        return Structure(*read_saved(Path(model)))
    if model == "demo":
        create: Callable[..., nn.Module] = partial(timm.create_model, **demo.MODEL_ARGS)
    else:
        if ":" not in model:
            _check_known(model)
        create = partial(create_model, model)
    if weights is not None:
        built = _with_weights(name, Path(weights), options, create)[0]
    else:
        with torch.device("meta"):
            built = create()
            if options != ModelOptions():
                built = create(**_keywords(built, name, options))
    if model == "demo":
        return Structure(built, "demo", Preprocessing(demo.MEAN, demo.STD))
    timm_name = _timm_name(model, built, pretrained=weights is None)
    return Structure(built, timm_name, _preprocessing(built, name))


def _keywords(meta_model: nn.Module, name: str, options: ModelOptions) -> dict[str, Any]:
    """Return the keywords of ``timm.create_model`` for options of a model without weights."""
    options.check_size(describe(meta_model, name))
    keywords = {
        key: value
        for key, value in dataclasses.asdict(options).items()
        if value is not None and key != "global_pool"
    }
    if options.global_pool is not None:
        keywords |= pool_keywords(meta_model, options.global_pool, norms_of(meta_model))
    return keywords


def _timm_name(name: str, model: nn.Module, *, pretrained: bool) -> str:
    """Return timm's name of a model, with the tag of its pretrained weights."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if name.startswith(LOCAL_PREFIX):
        return str(config.get("architecture", name))
    tag = config.get("tag", "") if pretrained else ""
    return f"{split_model_name_tag(name)[0]}.{tag}" if tag and ":" not in name else name


def _from_module(
    model: nn.Module,
    weights: str | Path | None,
    options: ModelOptions,
) -> LoadedModel:
    if weights is not None:
        raise SettingError(
            f"{option('weights')} goes with a model's name; a module has its own weights."
        )
    name = model_name(model)
    vit = convert(model, name)
    options.check_same(vit.arch, "the module in memory")
    return LoadedModel(name, name, vit, _preprocessing(model, name))


def _from_directory(
    path: Path,
    weights: str | Path | None,
    options: ModelOptions,
) -> LoadedModel:
    if weights is not None:
        raise SettingError(
            f"{str(path)!r} is a model with weights of its own; leave {option('weights')} out."
        )
    model, timm_name, preprocessing = read_saved(path)
    vit = convert(model, str(path))
    options.check_same(vit.arch, repr(str(path)))
    return LoadedModel(str(path), timm_name, vit, preprocessing, directory=path)


def model_name(model: str | nn.Module | LoadedModel) -> str:
    """Return the ``name`` that a model has once it is loaded.

    That of a module in memory is timm's name of its architecture, or its class.
    """
    if isinstance(model, str):
        return model
    if isinstance(model, LoadedModel):
        return model.name
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
            f"{option('img_size')} is {size_value(options.img_size)}; the demo model takes {side} "
            "pixels."
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
    return _with_weights(name, path, options, partial(create_model, arch))


def _with_weights(
    name: str, path: Path, options: ModelOptions, create: Callable[..., nn.Module]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a model with a file's weights by ``create``, which takes timm's keywords; returns it
    with notes."""
    keywords: dict[str, Any] = {} if options.in_chans is None else {"in_chans": options.in_chans}
    with torch.device("meta"):
        meta_model = create(**keywords)
    options.check_size(describe(meta_model, name))
    headless = options.num_classes == 0
    renamed = translate(meta_model, read_weights(path), name=name, path=path, headless=headless)
    keywords |= infer_keywords(meta_model, renamed.state, options, path)
    if options.img_size is not None:
        keywords["img_size"] = options.img_size
    model = create(**keywords)
    load_into(model, renamed.state, name=name, path=path, resize=options.img_size is not None)
    return model, renamed.notes


def _pretrained(name: str, options: ModelOptions) -> nn.Module:
    if ":" not in name:
        _check_known(name)
    with torch.device("meta"):
        meta_model: Any = create_model(name)
    arch = describe(meta_model, name)
    if ":" not in name:
        _check_pretrained(name, options)
    options.check_size(arch)
    if options.in_chans not in (None, arch.in_channels):
        raise WeightsError(
            f"The pretrained weights of {name!r} take {arch.in_channels} channels, not "
            f"{options.in_chans}. Leave {option('in_chans')} out, or give your own "
            f"{option('weights')}."
        )
    kwargs: dict[str, Any] = {"num_classes": 0} if options.num_classes == 0 else {}
    if options.img_size is not None:
        kwargs["img_size"] = options.img_size
    if options.global_pool is not None:
        kwargs |= pool_keywords(meta_model, options.global_pool, norms_of(meta_model))
        if "map" in (options.global_pool, meta_model.global_pool) and "global_pool" in kwargs:
            raise WeightsError(
                f"The pretrained weights of {name!r} are pooled by {meta_model.global_pool!r} and "
                f"cannot be pooled by {options.global_pool!r}.",
                f"Leave {option('global_pool')} out.",
            )
    return create_model(name, pretrained=True, **kwargs)


def _check_pretrained(name: str, options: ModelOptions) -> None:
    """Refuse names without pretrained weights, and another number of classes than theirs."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if config is None or not config.has_weights:
        raise PretrainedError(
            f"timm has no pretrained weights for {name!r}. Give a file of weights with "
            f"{option('weights')}, or a name with a tag from `dfq models`."
        )
    if options.num_classes not in (None, 0, config.num_classes):
        raise WeightsError(
            f"The pretrained weights of {name!r} have {config.num_classes} classes, not "
            f"{options.num_classes}. Leave {option('num_classes')} out, or give your own "
            f"{option('weights')}."
        )


def _check_known(name: str) -> None:
    """Refuse unknown names and tags before anything is downloaded."""
    arch = get_arch_name(name)
    if not timm.is_model(arch):
        if "architecture" in read_config(Path(name)):
            raise UnknownModelError(
                f"{name!r} is a folder that timm saved. Name it {LOCAL_PREFIX}{name} to load it."
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


def _preprocessing(model: nn.Module, name: str) -> Preprocessing:
    """Return the preprocessing of timm's data config of a model."""
    given: Any = getattr(model, "pretrained_cfg", None) or {}
    problem = data_problem(given)
    if problem is not None:
        field, value, allowed = problem
        raise UnsupportedModelError(
            f"{name!r}: {field} in its pretrained_cfg is {value!r:.80}; it must be {allowed}.",
            reason=f"its {field}",
        )
    config = timm.data.resolve_model_data_config(model)
    interpolation = config["interpolation"]
    return Preprocessing(
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
    )
