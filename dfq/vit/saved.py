"""Directories with a timm model: its weights and the arguments that build it.

``model.json`` holds the format, its version, ``timm`` (keywords of ``timm.create_model``),
``preprocessing`` and the SHA-256 of ``model.safetensors``, timm's state dict.  Only keywords that
define a shape are accepted, so that loading a directory cannot open other files or the network.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.models import is_model_in_modules
from torch import nn

from dfq.errors import UsageError, WeightsError
from dfq.files import read_json, write_bytes, write_json
from dfq.ownership import DirectoryFormat, check_replaceable, has_format, replaced_directory
from dfq.vit.architecture import Preprocessing, from_json, to_json
from dfq.vit.convert import check_finite
from dfq.vit.options import POOLS
from dfq.vit.preprocessing import check_preprocessing
from dfq.vit.sizes import BOUNDS, SIZES, size_problem

FORMAT, FORMAT_VERSION = "dfq-model", 2
CONFIG, WEIGHTS, REPORT = "model.json", "model.safetensors", "report.json"
DIRECTORY = DirectoryFormat(
    "a model that dfq wrote",
    re.compile("|".join(map(re.escape, (CONFIG, WEIGHTS, REPORT)))),
    CONFIG,
    FORMAT,
)

TIMM_MODULES = ("vision_transformer", "deit")
"""Modules of timm whose models can be saved."""


def check_output(path: Path) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, empty or a model that dfq wrote."""
    check_replaceable(path, DIRECTORY)


def is_saved(path: str | Path) -> bool:
    """Whether a directory was written by :func:`save_model`."""
    return has_format(Path(path) / CONFIG, FORMAT)


def save_model(
    path: Path,
    model: nn.Module,
    arguments: dict[str, Any],
    preprocessing: Preprocessing,
    report: dict[str, Any],
) -> None:
    """Write a timm model's directory atomically; an older one is replaced."""
    check_arguments(arguments)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    content = save(state)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "timm": arguments,
        "preprocessing": to_json(preprocessing),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with replaced_directory(path, DIRECTORY) as directory:
        write_bytes(directory / WEIGHTS, content)
        write_json(directory / CONFIG, config)
        write_json(directory / REPORT, report)


def check_arguments(arguments: Any) -> None:
    """Raise ValueError unless the arguments are a model's name and shape within bounds."""
    if not isinstance(arguments, dict):
        raise ValueError("timm is no object")
    name = arguments.get("model_name")
    if not isinstance(name, str) or not is_model_in_modules(name, TIMM_MODULES):
        raise ValueError(f"model_name is {name!r:.80}, no vision transformer of timm's")
    for key, value in arguments.items():
        if key == "global_pool":
            valid = value in POOLS
        elif key == "fc_norm":
            valid = type(value) is bool
        elif key in BOUNDS or key in SIZES:
            valid = size_problem(key, value) is None
        else:
            valid = key == "model_name"
        if not valid:
            raise ValueError(f"timm has {key!r:.80}: {value!r:.80}, which gives no shape")


def building_arguments(path: Path) -> dict[str, Any]:
    """Return the keywords of ``timm.create_model`` that build a saved model.

    Raises:
        WeightsError: the directory is damaged.
    """
    return _read_config(path)[0]


def _read_config(path: Path) -> tuple[dict[str, Any], Preprocessing, str]:
    """Return keywords, preprocessing, and the SHA-256 of the weights."""
    try:
        config = read_json(path / CONFIG)
        version = config.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r} is not {FORMAT_VERSION}")
        arguments = config["timm"]
        check_arguments(arguments)
        preprocessing = from_json(Preprocessing, config["preprocessing"])
        check_preprocessing(preprocessing, arguments.get("in_chans", 3))
        return dict(arguments), preprocessing, str(config["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise _damaged(path, error) from error


def read_saved(path: Path) -> tuple[nn.Module, str, Preprocessing]:
    """Read the timm module, timm's name of it, and its preprocessing.

    Raises:
        WeightsError: the directory is damaged.
    """
    arguments, preprocessing, digest = _read_config(path)
    try:
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"{WEIGHTS} is missing")
        content = (path / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"the SHA-256 of {WEIGHTS} is not the one in {CONFIG}")
        with torch.device("meta"):
            model = timm.create_model(**arguments, pretrained=False)
        state = load(content)
        if {tensor.dtype for tensor in state.values()} != {torch.float32}:
            raise ValueError("its tensors are not all float32")
        check_finite(state)
        model.load_state_dict(state, assign=True)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AssertionError,
        ArithmeticError,
        SafetensorError,
        UsageError,
    ) as error:
        raise _damaged(path, error) from error
    return model.requires_grad_(True), str(arguments["model_name"]), preprocessing


def _damaged(path: Path, error: Exception) -> WeightsError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__
    return WeightsError(f"The model {str(path)!r} cannot be read: {reason:.200}.")
