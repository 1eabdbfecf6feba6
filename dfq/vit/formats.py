"""Files and folders that hold a model in another form than weights of PyTorch: named for what
they are, with what to do."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from dfq.errors import WeightsError

START = 512
"""Bytes by which a file's format is told."""

PYTORCH = "Give the PyTorch weights"

ONNX_STARTS = tuple(bytes((8, version, 18)) for version in range(1, 20))
"""Field 1 of ONNX's ModelProto, the version of the format, then field 2, who wrote it."""

STARTS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (ONNX_STARTS, "an ONNX model", f"{PYTORCH} that it was exported from"),
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

AT_4 = {b"TFL3": "a TensorFlow Lite model"}

ENDINGS = {
    r"\.index$|\.data-\d{5}-of-\d{5}$": "part of a TensorFlow checkpoint",
    r"\.pb$": "a graph of TensorFlow",
    r"\.msgpack$": "a file of Flax",
}
"""What a file is whose start says nothing, by the end of its name."""

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
"""What a zip archive is, by the end of a name in it."""


def refuse_other_formats(path: Path) -> None:
    """Raise :class:`WeightsError` if a file is known to be something else than weights of
    PyTorch."""
    with path.open("rb") as file:
        start = file.read(START)
    for starts, what, advice in STARTS:
        if start.startswith(starts):
            raise other_format(path, what, advice)
    if start[4:8] in AT_4:
        raise other_format(path, AT_4[start[4:8]], PYTORCH)
    if start.startswith(b"PK"):
        _refuse_archives(path)
    elif start[257:262] == b"ustar":
        _refuse_tar(path)
    for pattern, what in ENDINGS.items():
        if re.search(pattern, path.name):
            raise other_format(path, what, PYTORCH)


def _refuse_archives(path: Path) -> None:
    names = names_in_zip(path)
    if not names:
        return  # what reads it says what is wrong
    for ends, what, advice in ARCHIVES:
        if any(name.endswith(ends) for name in names):
            raise other_format(path, what, advice)
    if not any(name.endswith("data.pkl") for name in names):
        raise _packed(path, "a zip archive", names)


def names_in_zip(path: Path) -> list[str]:
    """Names of the files in a zip archive; none of a file that is no whole one."""
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
    return other_format(
        path, f"{what} of {len(names)} files ({inside:.200})", "Unpack it, and give one of them"
    )


def other_format(path: Path, what: str, advice: str) -> WeightsError:
    """The error that names what a file or a folder is and what to do."""
    return WeightsError(f"{str(path)!r} is {what}. {advice}.")


def folder_given(path: Path) -> WeightsError:
    """The error for a folder in the place of a file of weights."""
    config = read_config(path)
    if (path / "adapter_config.json").is_file():
        return other_format(
            path,
            "a folder of peft: an adapter without its model",
            "Merge the adapter into its model first (model.merge_and_unload())",
        )
    if "architecture" in config:
        return other_format(
            path, "a folder that timm saved", f"Give it as MODEL, without weights: local-dir:{path}"
        )
    if "model_type" in config or "architectures" in config:
        return other_format(
            path,
            f"a folder of Transformers ({config.get('model_type', 'unknown')!s:.40})",
            "Take the same model from timm (`dfq models`), or save its weights under timm's names",
        )
    if (path / "saved_model.pb").is_file():
        return other_format(path, "a SavedModel of TensorFlow", PYTORCH)
    return WeightsError(f"Weights file {str(path)!r} does not exist or is not a file.")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's ``config.json``; empty where it is missing or no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
