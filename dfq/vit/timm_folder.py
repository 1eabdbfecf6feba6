"""Folders that timm saved (``timm.models.save_for_hf``): the values of their ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from dfq.errors import UnknownModelError
from dfq.files import read_json
from dfq.vit.architecture import CropMode, Interpolation

PREFIX = "local-dir:"
"""Prefix of the path of such a folder where a model's name is expected."""

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
"""Arguments of timm's models that are at least 1."""


def check_config(name: str) -> None:
    """Check ``config.json`` of a folder before timm builds a model from it.

    Args:
        name: :data:`PREFIX` and the path of the folder.

    Raises:
        UnknownModelError: a value is not one that timm writes; fields that timm does not need may
            be missing.
    """
    path = Path(name.removeprefix(PREFIX)) / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise UnknownModelError(f"{name!r} is no folder that timm saved: {error}.") from error
    if isinstance(config, dict) and "architecture" not in config:
        raise UnknownModelError(
            f"{name!r} has no timm architecture in its config.json; models of Transformers are not "
            "taken. Look for the same model in `dfq models`."
        )
    problem = _problem(config)
    if problem is not None:
        raise UnknownModelError(
            f"{name!r} is no folder that timm saved: config.json has {problem}. Save the model "
            "again with timm.models.save_for_hf."
        )


def _problem(config: Any) -> str | None:
    if not isinstance(config, dict):
        return "no JSON object"
    if not isinstance(config["architecture"], str):
        return f"the architecture {config['architecture']!r:.60}; allowed: timm's name of it"
    for field in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(field, {}), dict):
            return f"{field} {config[field]!r:.60}; allowed: a JSON object"
    for field, value in config.get("model_args", {}).items():
        least = int(field in SIZES)
        if isinstance(value, int) and value < least:
            return f"the model argument {field} = {value!r:.60}; allowed: from {least}"
    data = {**config, **config.get("pretrained_cfg", {})}
    for field in ("mean", "std"):
        if field in data and not _is_values(data[field], positive=field == "std"):
            return f"{field} {data[field]!r:.60}; allowed: a number for each channel"
    if "crop_pct" in data and not (_is_number(data["crop_pct"]) and 0 < data["crop_pct"] <= 1):
        return f"crop_pct {data['crop_pct']!r:.60}; allowed: above 0, at most 1"
    for field, choices in (("interpolation", Interpolation), ("crop_mode", CropMode)):
        if field in data and data[field] not in get_args(choices):
            allowed = ", ".join(get_args(choices))
            return f"{field} {data[field]!r:.60}; allowed: {allowed}"
    size = data.get("input_size")
    if "input_size" in data and not (isinstance(size, list) and len(size) == 3 and _counts(size)):
        return f"input_size {size!r:.60}; allowed: channels, height and width"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_values(value: Any, *, positive: bool) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(_is_number(v) and (v > 0 or not positive) for v in value)
    )


def _counts(values: list[Any]) -> bool:
    return all(type(v) is int and 0 < v < 1 << 20 for v in values)
