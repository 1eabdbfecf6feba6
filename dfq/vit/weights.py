"""Reading of weights files: safetensors, JAX's archives, and torch files without running code."""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dfq.errors import WeightsError
from dfq.failures import explained, first_line
from dfq.files import read_json, utf8_path
from dfq.vit.convert import check_finite
from dfq.vit.formats import folder_error, names_in_zip, refuse_other_formats
from dfq.vit.jax_weights import read_jax
from dfq.vit.names import rename

STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "encoder")
"""Keys of the state dict within training checkpoints, in timm's order of preference."""

MIN_FLOAT_BITS = 16
"""Smallest number of bits of supported floating-point types."""

SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.(safetensors|bin)$")
"""Ending of the name of one of several shards."""


class Placeholder:
    """Substitute for an object stored beside the weights; accepts any arguments, keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class PlaceholderDict:
    """Substitute for a subclass of dict; constructing it gives an empty ``OrderedDict``."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


IGNORED = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "easydict.EasyDict",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.Path",
    "pathlib._local.PosixPath",
    "pathlib._local.PurePath",
    "pathlib._local.PurePosixPath",
    "pathlib._local.PureWindowsPath",
    "pathlib._local.WindowsPath",
    "types.SimpleNamespace",
    "uuid.UUID",
)
"""Classes and functions that training scripts pickle beside weights.  :class:`Placeholder` is
constructed instead; none of them is imported or called."""

IGNORED_DICTS = (
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict; from a training checkpoint, averaged weights if there are any.

    For sharded weights, ``path`` is their index (``*.index.json``).

    Raises:
        WeightsError: the file is missing, damaged, of another format, or holds no state dict.
    """
    _check_readable(path)
    content: Any = _read_shards(path) if path.suffix == ".json" else _read_file(path)
    for found in _dicts(content):
        if weights := _weights(found, path):
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
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" and any(name.endswith(".npy") for name in names_in_zip(path)):
        return read_jax(path)
    refuse_other_formats(path)
    return (
        _read_torch(path) if start in (b"PK", b"\x80\x02", b"\x80\x04") else _read_safetensors(path)
    )


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
        found, inner_seen = waiting.pop()
        if inner_seen:
            yield found
        elif isinstance(found, dict) and id(found) not in seen:
            seen.add(id(found))
            waiting.append((found, True))
            waiting += [(found.get(key), False) for key in reversed(STATE_DICT_KEYS)]


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


def _read_torch(path: Path) -> Any:
    def explain(error: Exception) -> WeightsError:
        if "Weights only load failed" in str(error):
            return WeightsError(
                f"{str(path)!r} holds more than weights{_blocked(error)}, which is never "
                "unpickled. Save model.state_dict(), or use safetensors."
            )
        return WeightsError(
            f"{str(path)!r} is not a whole torch file ({first_line(error)}). Check that the "
            "download is complete."
        )

    allowed: list[Any] = [(Placeholder, name) for name in IGNORED]
    allowed += [(PlaceholderDict, name) for name in IGNORED_DICTS]
    trusted = torch.serialization.safe_globals(allowed)
    with explained(explain), trusted, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _blocked(error: Exception) -> str:
    _, found, rest = str(error).partition("GLOBAL ")
    return f" ({rest.split()[0]:.100})" if found and rest.split() else ""
