"""Errors for files and folders of other formats than PyTorch weights, with advice."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from dfq.errors import WeightsError
from dfq.files import read_json

HEADER_BYTES = 512
"""Bytes at the start of a file that are compared with signatures."""

LARGEST_HEADER = 100_000_000
"""Largest header of a safetensors file in bytes, which its specification sets."""

PYTORCH = "Give the PyTorch weights"

ONNX_SIGNATURES = tuple(bytes((8, version, 18)) for version in range(1, 20))
"""Field 1 of ONNX's ModelProto, the version of the format, then field 2, who wrote it."""

SIGNATURES: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (ONNX_SIGNATURES, "an ONNX model", f"{PYTORCH} that it was exported from"),
    (
        (b"\x89HDF\r\n\x1a\n",),
        "an HDF5 file, as Keras and TensorFlow write weights",
        f"{PYTORCH}, or take the same model from timm (`dfq models`)",
    ),
    ((b"GGUF",), "a GGUF file", f"{PYTORCH} that it was made from"),
    ((b"\x93NUMPY",), "one NumPy array", "Give a file of named tensors"),
    (
        (b"version https://git-lfs",),
        "a pointer to a file of Git LFS, not the file itself",
        "Fetch it with `git lfs pull`",
    ),
    (
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML"),
        "a web page",
        "Download the file itself",
    ),
    (
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!"),
        "a compressed file",
        "Unpack it, and give the file of weights in it",
    ),
)

SIGNATURES_AT_4 = {b"TFL3": "a TensorFlow Lite model"}

NAME_PATTERNS = {
    r"\.index$|\.data-\d{5}-of-\d{5}$": "part of a TensorFlow checkpoint",
    r"\.pb$": "a graph of TensorFlow",
    r"\.msgpack$": "a file of Flax",
}
"""Formats without a signature, by a pattern of the file name."""

ARCHIVES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("constants.pkl",),
        "a TorchScript archive: a program, not a state dict",
        "Load it with torch.jit.load(FILE) and save its state_dict()",
    ),
    (
        ("archive_format", "serialized_exported_program.json"),
        "a program of torch.export",
        "Load it with torch.export.load(FILE) and save its state_dict",
    ),
    (("model.weights.h5",), "a Keras model", PYTORCH),
    (("coremldata.bin", "Manifest.json"), "a Core ML model", PYTORCH),
)
"""Formats that are zip archives, by the ending of a name in the archive."""


def is_safetensors(start: bytes) -> bool:
    """Whether a file that starts with these bytes (9 or more) has a header of safetensors: its
    length in 8 bytes, then a JSON object.

    The length may be the signature of another format, so this is asked first.
    """
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER


def refuse_other_formats(path: Path) -> None:
    """Raise :class:`WeightsError` if a file has a known format other than PyTorch weights."""
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    for starts, what, advice in SIGNATURES:
        if start.startswith(starts):
            raise format_error(path, what, advice)
    if start[4:8] in SIGNATURES_AT_4:
        raise format_error(path, SIGNATURES_AT_4[start[4:8]], PYTORCH)
    if start.startswith(b"PK"):
        _refuse_archives(path)
    elif start[257:262] == b"ustar":
        _refuse_tar(path)
    for pattern, what in NAME_PATTERNS.items():
        if re.search(pattern, path.name):
            raise format_error(path, what, PYTORCH)


def _refuse_archives(path: Path) -> None:
    names = names_in_zip(path)
    if not names:
        return  # what reads it says what is wrong
    for ends, what, advice in ARCHIVES:
        if any(name.endswith(ends) for name in names):
            raise format_error(path, what, advice)
    if not any(name.endswith("data.pkl") for name in names):
        raise _packed(path, "a zip archive", names)


def names_in_zip(path: Path) -> list[str]:
    """Return the names in a zip archive; none if the file is not a complete archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return []


def _refuse_tar(path: Path) -> None:
    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()
    except (OSError, tarfile.TarError):
        return
    raise _packed(path, "a tar archive", names)


def _packed(path: Path, what: str, names: list[str]) -> WeightsError:
    inside = ", ".join(map(repr, sorted(names)[:3])) or "nothing"
    return format_error(
        path, f"{what} of {len(names)} files ({inside:.200})", "Unpack it, and give one of them"
    )


def format_error(path: Path, what: str, advice: str) -> WeightsError:
    """Return the error for a file or folder of another format, with advice."""
    return WeightsError(f"{str(path)!r} is {what}. {advice}.")


def folder_error(path: Path) -> WeightsError:
    """Return the error for a folder given instead of a weights file."""
    config = read_config(path)
    if (path / "adapter_config.json").is_file():
        return format_error(
            path,
            "a folder of peft: an adapter without its model",
            "Merge the adapter into its model first (model.merge_and_unload())",
        )
    if "architecture" in config:
        return format_error(
            path, "a folder that timm saved", f"Give it as MODEL, without weights: local-dir:{path}"
        )
    if "model_type" in config or "architectures" in config:
        return format_error(
            path,
            f"a folder of Transformers ({config.get('model_type', 'unknown')!s:.40})",
            "Take the same model from timm (`dfq models`), or save its weights under timm's names",
        )
    if (path / "saved_model.pb").is_file():
        return format_error(path, "a SavedModel of TensorFlow", PYTORCH)
    return WeightsError(f"Weights file {str(path)!r} does not exist or is not a file.")


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``; empty if it is missing or not a JSON object."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
