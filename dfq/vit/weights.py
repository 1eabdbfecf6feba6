"""Reading of weights files: whole or sharded, and the state dict in what they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dfq.errors import WeightsError
from dfq.files import read_json, utf8_path
from dfq.vit.convert import check_finite
from dfq.vit.formats import folder_error, is_safetensors, names_in_zip, refuse_other_formats
from dfq.vit.jax_weights import read_jax
from dfq.vit.names import rename
from dfq.vit.torch_files import read_torch

STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "encoder")
"""Keys of the state dict within training checkpoints, in timm's order of preference."""

MIN_FLOAT_BITS = 16
"""Smallest number of bits of supported floating-point types."""

SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.(safetensors|bin)$")
"""Ending of the name of one of several shards."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict; from a training checkpoint, averaged weights if there are any.

    For sharded weights, ``path`` is their index (``*.index.json``).

    Raises:
        WeightsError: the file is missing, damaged, of another format, or holds no state dict.
    """
    _check_readable(path)
    content: Any = _read_shards(path) if path.suffix == ".json" else _read_file(path)
    for candidate in _dicts(content):
        if weights := _weights(candidate, path):
            break
    else:
        keys = f" (it has {sorted(map(str, content))[:6]})" if isinstance(content, dict) else ""
        raise WeightsError(f"{str(path)!r} holds no model weights{keys}; expected a state dict.")
    for key, value in weights.items():
        _check_tensor(key, value, path)
    check_finite(weights)
    return {key: value.detach() for key, value in weights.items()}


def _check_readable(path: Path) -> None:
    if os.path.isdir(path):
        raise folder_error(path)
    if not os.path.isfile(path):
        raise WeightsError(f"Weights file {str(path)!r} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise WeightsError(f"Weights file {str(path)!r} is empty.")
    if SHARD.search(path.name):
        raise WeightsError(
            f"{str(path)!r} is one of several files of a model. Give their index, a file that ends "
            "in .index.json."
        )


def _read_file(path: Path) -> Any:
    """Read a file by its content; its name and suffix do not matter."""
    with path.open("rb") as file:
        start = file.read(9)
    if is_safetensors(start):
        return _read_safetensors(path)
    if start.startswith(b"PK") and any(name.endswith(".npy") for name in names_in_zip(path)):
        return read_jax(path)
    refuse_other_formats(path)
    return read_torch(path) if start.startswith((b"PK", b"\x80")) else _read_safetensors(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors that an index of sharded weights names, each from the file it names."""
    try:
        files = read_json(index)["weight_map"]
        names: dict[Any, list[str]] = {}
        for key, name in files.items():
            names.setdefault(name, []).append(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{str(index)!r} is a JSON file and no index of sharded weights. Give a weights file."
        ) from error
    state: dict[str, Tensor] = {}
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{str(index)!r} names {name!r:.100}, which is no file beside it.")
        if not os.path.isfile(index.parent / name):
            raise WeightsError(
                f"{name!r:.100}, one of the {len(names)} files that {str(index)!r} names, is "
                "missing. Put all of them beside it."
            )
        content = _read_file(index.parent / name)
        absent = [k for k in names[name] if not isinstance(content, dict) or k not in content]
        if absent:
            raise WeightsError(
                f"{str(index.parent / name)!r} lacks {len(absent)} tensors that {index.name!r} "
                f"says are in it, such as {min(absent)!r}. Check that the download is complete."
            )
        state |= {key: content[key] for key in names[name]}
    return state


def _dicts(content: Any) -> Iterator[dict[Any, Any]]:
    """Yield the dicts of a training checkpoint that may be state dicts, the preferred first."""
    seen: set[int] = set()
    waiting = [(content, False)]
    while waiting:
        item, inner_seen = waiting.pop()
        if inner_seen:
            yield item
        elif isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            waiting.append((item, True))
            waiting += [(item.get(key), False) for key in reversed(STATE_DICT_KEYS)]


def _weights(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a dict, or of the dicts in it under names with dots; none if all of
    them are single numbers."""
    flat: dict[tuple[Any, ...], Any] = {(k,): v for k, v in content.items()}
    if not any(map(_is_weight, flat.values())):
        inner = {k: v for k, v in content.items() if isinstance(v, dict)}
        flat = {(k, key): value for k, v in inner.items() for key, value in v.items()}
    if not any(map(_is_weight, flat.values())):
        return {}
    tensors = {keys: value for keys, value in flat.items() if isinstance(value, Tensor)}
    return rename(tensors, lambda keys: ".".join(map(str, keys)), path)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _check_tensor(key: str, value: Tensor, path: Path) -> None:
    where = f"{str(path)!r}: {key!r}"
    if value.is_meta:
        raise WeightsError(
            f"{where} is on the meta device and holds no values. Save the state dict of a model "
            "whose weights are loaded."
        )
    if value.is_quantized:
        raise WeightsError(f"{where} is quantized ({value.dtype}). Save the float model's weights.")
    if value.layout != torch.strided or not value.numel():
        raise WeightsError(f"{where} is empty or no plain tensor of numbers ({value.layout}).")
    if value.is_complex():
        raise WeightsError(f"{where} is {value.dtype}; weights are real numbers.")
    if value.is_floating_point() and 8 * value.element_size() < MIN_FLOAT_BITS:
        raise WeightsError(
            f"{where} is {value.dtype}, whose values need scales to be read. Save the weights as "
            "float16, bfloat16 or float32."
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_path(path) as readable:
            return dict(load_file(readable))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{str(path)!r} is not a whole safetensors or torch file ({error}). "
            "Check that the download is complete."
        ) from error
