"""timm models in directories of their own, with the arguments that build them.

``model.json`` has the format, its version, ``timm`` (keywords of ``timm.create_model``) and
``preprocessing``; ``model.safetensors`` timm's state dict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from dfq.errors import WeightsError
from dfq.files import check_replaceable, has_format, replaced_directory, write_bytes, write_json
from dfq.vit.architecture import Preprocessing, from_json, to_json

FORMAT, FORMAT_VERSION = "dfq-model", 1
CONFIG, WEIGHTS, REPORT = "model.json", "model.safetensors", "report.json"


def check_output(path: Path) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, empty or a model that dfq wrote."""
    check_replaceable(path, CONFIG, FORMAT, "a model that dfq wrote")


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
    """Write a timm model's directory in one step; an older one there is replaced."""
    check_output(path)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "timm": arguments,
        "preprocessing": to_json(preprocessing),
    }
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replaced_directory(path) as directory:
        write_bytes(directory / WEIGHTS, save(state))
        write_json(directory / CONFIG, config)
        write_json(directory / REPORT, report)


def building_arguments(path: Path) -> dict[str, Any]:
    """The keywords of ``timm.create_model`` that build a saved model.

    Raises:
        WeightsError: the directory is damaged.
    """
    try:
        return dict(json.loads((path / CONFIG).read_text(encoding="utf-8"))["timm"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"The model {str(path)!r} cannot be read: {error!r:.200}.") from error


def read_saved(path: Path) -> tuple[nn.Module, str, Preprocessing]:
    """The timm module, timm's name of it, and its preprocessing.

    Raises:
        WeightsError: the directory is damaged.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if config.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {config.get('format_version')!r} is unknown")
        preprocessing = from_json(Preprocessing, config["preprocessing"])
        arguments = dict(config["timm"])
        model = timm.create_model(**{**arguments, "pretrained": False})
        model.load_state_dict(load_file(path / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"The model {str(path)!r} cannot be read: {reason:.200}.") from error
    return model, str(arguments["model_name"]), preprocessing
