"""Checkpoints: quantized models as directories, with strict checks.

The format is specified in ``docs/checkpoint-format.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dfq.device import resolve_device
from dfq.errors import CheckpointError, SettingError, UsageError
from dfq.files import read_json, sha256, sha256_once, utf8_path, write_bytes, write_json
from dfq.ownership import DirectoryFormat, check_replaceable, replaced_directory
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.model import QuantizedViT
from dfq.recipe import QuantizationSettings, Recipe, recipe_from_dict, to_dict, to_toml
from dfq.vit.architecture import (
    Architecture,
    Preprocessing,
    from_json,
    to_json,
)
from dfq.vit.preprocessing import check_preprocessing

FORMAT = "dfq-checkpoint"
FORMAT_VERSION = 8
READABLE = (5, 6, 7, 8)
CONFIG, MODEL, REPORT, RECIPE = "config.json", "model.safetensors", "report.json", "recipe.toml"
DIRECTORY = DirectoryFormat(
    "a dfq checkpoint",
    re.compile("|".join(map(re.escape, (CONFIG, MODEL, REPORT, RECIPE)))),
    CONFIG,
    FORMAT,
)

MAX_DEPTH = 4096
"""Largest number of blocks that is read."""

_DIGEST = re.compile("[0-9a-f]{64}")

_SAFETENSORS_NAMES = {
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class CheckpointInfo:
    """Content of ``config.json``.

    ``model``: name given by the user.  ``source``: origin of the weights and the calibration set.
    """

    model: str
    arch: Architecture
    preprocessing: Preprocessing
    recipe: Recipe
    source: dict[str, Any]


def check_output(path: Path) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, empty or a dfq checkpoint alone."""
    check_replaceable(path, DIRECTORY)


def save_checkpoint(
    path: Path,
    model: QuantizedViT,
    *,
    name: str,
    recipe: Recipe,
    source: dict[str, Any],
) -> int:
    """Write a checkpoint directory atomically; an older checkpoint is replaced.

    Returns the size of ``model.safetensors`` in bytes.

    Raises:
        OutputError: the directory cannot be written, or holds something else.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    config = {
        "format": FORMAT,
        "format_version": _needed_version(recipe.quantization),
        "model": name,
        "architecture": to_json(model.arch),
        "preprocessing": to_json(model.preprocessing),
        "recipe": to_dict(recipe),
        "activation_ranges": {k: list(q.range) for k, q in model.activation_qparams().items()},
        "source": source,
    }
    content = save(state)
    config["sha256"] = _digest(hashlib.sha256(content), model.arch, model.preprocessing)
    with replaced_directory(path, DIRECTORY) as directory:
        write_bytes(directory / MODEL, content)
        write_bytes(directory / RECIPE, to_toml(recipe).encode())
        write_json(directory / CONFIG, config)
    return len(content)


def _needed_version(settings: QuantizationSettings) -> int:
    """Return the oldest version of the format that knows everything in the settings."""
    return FORMAT_VERSION if settings.activations == "symmetric" else 7


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write ``report.json``, the measured results, into a checkpoint."""
    write_json(path / REPORT, report)


def read_info(path: str | Path) -> CheckpointInfo:
    """Read and check ``config.json``.

    Raises:
        CheckpointError: the directory is no checkpoint, or a field is malformed.
    """
    return _info(_read_config(Path(path)), path)


def _info(config: dict[str, Any], path: str | Path) -> CheckpointInfo:
    try:
        recipe = recipe_from_dict(config["recipe"], f"{CONFIG}: recipe")
    except KeyError as error:
        raise CheckpointError(f"{CONFIG} of {str(path)!r} lacks the field {error}.") from error
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    arch = from_json(Architecture, config.get("architecture"))
    preprocessing = from_json(Preprocessing, config.get("preprocessing"))
    _check_arch(arch, preprocessing)
    source = config.get("source")
    if not isinstance(source, dict) or not isinstance(config.get("model"), str):
        raise CheckpointError(f"{CONFIG} of {str(path)!r} lacks 'source' or 'model'.")
    return CheckpointInfo(config["model"], arch, preprocessing, recipe, source)


def recorded_digest(path: str | Path) -> str:
    """Return the SHA-256 in ``config.json``, as :func:`verified_digest` does, without reading the
    weights.

    Raises:
        CheckpointError: the directory is no checkpoint, or the digest is malformed.
    """
    return _recorded(_read_config(Path(path)), path)


def _recorded(config: dict[str, Any], path: str | Path) -> str:
    digest = config.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CheckpointError(f"{CONFIG} of {str(path)!r} lacks a field 'sha256' of 64 digits.")
    return digest


def verified_digest(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a checkpoint's weights, architecture and preprocessing.

    A process reads the weights once for it, unless the file changes.

    Raises:
        CheckpointError: the directory is no checkpoint, or its files have another digest than
            the recorded one.
    """
    path = Path(path)
    config = _read_config(path)
    info, expected = _info(config, path), _recorded(config, path)
    try:
        _check_digest(path / MODEL, sha256_once(path / MODEL), info, expected)
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path / MODEL)!r} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{str(path / MODEL)!r} cannot be read: {error}.") from error
    return expected


def _check_arch(arch: Architecture, preprocessing: Preprocessing) -> None:
    problem = _size_problem(arch) or _structure_problem(arch)
    if problem is not None:
        raise CheckpointError(f"{CONFIG}: architecture: {problem}.")
    check_preprocessing(preprocessing, arch.in_channels)


def _size_problem(arch: Architecture) -> str | None:
    """Return what is wrong with a size by itself; None if nothing is."""
    names = ["in_channels", "embed_dim", "depth", "num_heads", "head_dim", "mlp_hidden"]
    names += ["pool_heads", "pool_hidden"] if arch.pool == "map" else []
    zero = next((name for name in names if getattr(arch, name) < 1), None)
    if zero is not None:
        return f"{zero} is {getattr(arch, zero)}; it must be at least 1"
    if arch.depth > MAX_DEPTH:
        return f"depth is {arch.depth}; it must be at most {MAX_DEPTH}"
    return None


def _structure_problem(arch: Architecture) -> str | None:
    """Return which two fields contradict each other, and how; None if none do."""
    prefix, pooled = arch.num_prefix_tokens, arch.pooled_tokens or 0
    rules = (
        (
            arch.grid.patches < 1,
            f"image_size is {list(arch.image_size)}, less than a patch_size of "
            f"{list(arch.patch_size)}",
        ),
        (
            arch.pool == "map" and arch.embed_dim % max(1, arch.pool_heads) > 0,
            f"embed_dim is {arch.embed_dim}; it must be a multiple of pool_heads "
            f"({arch.pool_heads})",
        ),
        (
            prefix < pooled,
            f"num_prefix_tokens is {prefix}; a pool of {arch.pool!r} needs at least {pooled}",
        ),
        (
            arch.rope and arch.head_dim % 2 > 0,
            f"head_dim is {arch.head_dim}; with rope it must be even",
        ),
        (arch.rope and arch.relative_bias, "rope and relative_bias are both true"),
        (
            arch.pool == "token" and not arch.class_token,
            "class_token is false; a pool of 'token' needs it",
        ),
        (
            arch.relative_bias and prefix != 1,
            f"num_prefix_tokens is {prefix}; with relative_bias it must be 1",
        ),
    )
    return next((message for broken, message in rules if broken), None)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{str(path)!r} is not a dfq checkpoint: it has no {CONFIG}. "
            "`dfq quantize MODEL --out DIR` makes one."
        )
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{str(file)!r} is not the configuration of a dfq checkpoint.")
    version = config.get("format_version")
    if type(version) is not int or version not in READABLE:
        raise CheckpointError(
            f"{str(file)!r} has format version {version!r}; this dfq reads "
            f"{', '.join(map(str, READABLE))}. Install the dfq that wrote it, or quantize again."
        )
    return _with_full_range(config) if version == 5 else config


def _with_full_range(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of format 5, which knew no ``reduce_range``, with that field: its
    weights take the full range."""
    recipe = config.get("recipe")
    settings = recipe.get("quantization") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(settings, dict):
        return config  # which is refused where the recipe is read
    recipe = {**recipe, "quantization": {"reduce_range": False, **settings}}
    return {**config, "recipe": recipe}


def load(
    path: str | Path, *, device: torch.device | str = "cpu", compiled: bool = False
) -> QuantizedViT:
    """Load a checkpoint as a module on PyTorch.

    Nothing is unpickled or downloaded.  Names, types and shapes of all tensors are
    compared with the architecture before any of them is read.

    Args:
        compiled: run everything but the integer products through ``torch.compile``: see
            :meth:`QuantizedViT.compile`.

    Raises:
        CheckpointError: the directory is no checkpoint, or its files are damaged.
        DeviceError: the device is not there.
        SettingError: ``compiled`` without a C++ compiler.
    """
    path, target = Path(path), resolve_device(device)
    config = _read_config(path)
    info, digest = _info(config, path), _recorded(config, path)
    try:
        with torch.device("meta"):
            model = QuantizedViT(info.arch, info.recipe.quantization, info.preprocessing)
    except SettingError as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"The architecture in {CONFIG} cannot be built: {error}") from error
    state = _read_state(path / MODEL, model.state_dict())
    _check_integers(model, state, path / MODEL)
    model.load_state_dict(state, assign=True)
    model.set_normalization()
    _check_ranges(model, config.get("activation_ranges"))
    _check_digest(path / MODEL, sha256(path / MODEL), info, digest)
    model.to(target)
    model.graphs.enabled = True
    if compiled:
        model.compile()
    return model


def _read_state(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{str(path)!r} is no regular file.")
    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                odd = sorted(names ^ set(expected))
                raise CheckpointError(
                    f"{str(path)!r} does not hold the tensors of its architecture; "
                    f"{len(odd)} are missing or unknown, such as {odd[0]!r}."
                )
            for name, tensor in expected.items():
                part = file.get_slice(name)
                dtype, shape = _SAFETENSORS_NAMES.get(part.get_dtype()), part.get_shape()
                if dtype != tensor.dtype or list(shape) != list(tensor.shape):
                    raise CheckpointError(
                        f"{str(path)!r}: {name!r} is {part.get_dtype()} {list(shape)}, but the "
                        f"architecture asks for {tensor.dtype} {list(tensor.shape)}."
                    )
            state = {name: file.get_tensor(name).clone() for name in expected}
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path)!r} is missing.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a whole safetensors file: {error}. Quantize again."
        ) from error
    for name, tensor in state.items():
        _check_values(name, tensor, path)
    return state


def _digest(weights: Any, arch: Architecture, preprocessing: Preprocessing) -> str:
    """Return the SHA-256 (hex) of the weights' digest, the architecture and the preprocessing."""
    weights.update(json.dumps([to_json(arch), to_json(preprocessing)], sort_keys=True).encode())
    return str(weights.hexdigest())


def _check_digest(path: Path, weights: Any, info: CheckpointInfo, expected: Any) -> None:
    if _digest(weights, info.arch, info.preprocessing) != expected:
        raise CheckpointError(
            f"{str(path)!r} and the architecture and preprocessing in {CONFIG} are damaged: their "
            "SHA-256 is not the one recorded there. Quantize again, or copy the checkpoint again."
        )


def _check_values(name: str, tensor: torch.Tensor, path: Path) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{str(path)!r}: {name!r} holds NaN or infinite values.")
    if name.endswith(("_scale", ".scales")) and not bool((tensor > 0).all()):
        raise CheckpointError(f"{str(path)!r}: {name!r} holds a scale that is not above 0.")


def _check_integers(model: QuantizedViT, state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise :class:`CheckpointError` unless scales of groups and zero points fit their types."""
    for name, layer in model.named_modules():
        if not isinstance(layer, IntegerLinear):
            continue
        if layer.group:
            largest, scales = layer.scheme.largest_group_scale, state[f"{name}.group_scale"]
            if int(scales.max()) > largest:
                raise CheckpointError(
                    f"{str(path)!r}: '{name}.group_scale' holds a scale above {largest}."
                )
        zero_point, inputs = int(state[f"{name}.input_zero_point"]), layer.scheme.input
        largest = 0 if inputs.signed else inputs.qmax
        if not 0 <= zero_point <= largest:
            raise CheckpointError(
                f"{str(path)!r}: '{name}.input_zero_point' is {zero_point}, outside 0..{largest}."
            )


def _check_ranges(model: QuantizedViT, ranges: Any) -> None:
    expected = model.activation_qparams()
    if not isinstance(ranges, dict) or set(ranges) != set(expected):
        raise CheckpointError(f"{CONFIG}: activation_ranges do not name the model's activations.")
    for name, qparams in expected.items():
        low, high = qparams.range
        given = ranges[name]
        good = (
            isinstance(given, list)
            and len(given) == 2
            and all(type(v) in (int, float) and abs(v) < 1e300 for v in given)
            and math.isclose(given[0], low, rel_tol=1e-6)
            and math.isclose(given[1], high, rel_tol=1e-6)
        )
        if not good:
            raise CheckpointError(
                f"{CONFIG} says that {name!r} spans {given!r:.60}, {MODEL} that it spans "
                f"[{low}, {high}]: the two files are not of one checkpoint."
            )
