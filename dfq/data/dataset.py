"""Sparse-image datasets on disk: shards, writer and reader.

The format is specified in ``docs/dataset-format.md``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dfq.data.settings import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SETTINGS,
    check_header,
    grid_from_json,
    inversion_of,
    label_bound,
    read_object,
    read_settings,
)
from dfq.errors import DamagedError, DatasetError, OutputError
from dfq.files import TEMPORARY, explain, make_directory, write_bytes, write_json
from dfq.ownership import DirectoryFormat, followed, remove_abandoned
from dfq.sparse import Grid, SparseImages, join

SHARD_NAME = re.compile(r"shard-([0-9]{5,})-([0-9]{1,7})\.safetensors")
DIRECTORY = DirectoryFormat(
    "a dataset",
    re.compile("|".join([re.escape(SETTINGS), re.escape(MANIFEST), SHARD_NAME.pattern])),
    SETTINGS,
    FORMAT,
)

_DTYPES = {
    "patches": torch.uint8,
    "positions": torch.int32,
    "labels": torch.int32,
    "stage": torch.int32,
    "trajectory": torch.int32,
}


def shard_name(unit: int, patches: int) -> str:
    """Return the file name of the shard with a unit's images of ``patches`` patches."""
    return f"shard-{unit:05d}-{patches}.safetensors"


def encode_shard(images: SparseImages) -> bytes:
    """Encode images as a shard; the same images always give the same bytes."""
    tensors = {
        name: getattr(images, name).to("cpu", dtype).contiguous() for name, dtype in _DTYPES.items()
    }
    return save(tensors, metadata={"sha256": _content_hash(tensors)})


def _content_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def decode_shard(content: bytes, grid: Grid, name: str) -> SparseImages:
    """Decode a shard and check names, dtypes, shapes and values.

    Raises:
        DamagedError: the shard does not conform to the format.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{name}: not a whole safetensors file ({error}).") from error
    if {k: t.dtype for k, t in tensors.items()} != _DTYPES:
        raise DamagedError(f"{name}: its tensors are not those of a sparse-image shard.")
    patches = tensors["patches"]
    n, k = patches.shape[:2] if patches.ndim == 3 else (0, 0)
    shapes = [tuple(tensors[t].shape) for t in _DTYPES]
    if shapes != [(n, k, grid.patch_values), (n, k), (n,), (n,), (n,)]:
        raise DamagedError(f"{name}: its tensors have shapes {shapes}, which do not fit {grid}.")
    positions = tensors["positions"].long()
    ordered = positions.sort(dim=1).values
    in_range = k == 0 or bool((ordered[:, 0] >= 0).all() and (ordered[:, -1] < grid.patches).all())
    if not in_range or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise DamagedError(f"{name}: patch positions are out of range or repeat.")
    rest = {t: tensors[t].long() for t in ("labels", "stage", "trajectory")}
    if any(
        bool((rest[t] < low).any()) for t, low in (("labels", -1), ("stage", 0), ("trajectory", 0))
    ):
        raise DamagedError(f"{name}: a label, stage or trajectory is below its bound.")
    return SparseImages(patches=patches, positions=positions, **rest)


class DatasetWriter:
    """Writer of a dataset, shard by shard; an interrupted run can be resumed.

    ``settings`` is the content of ``settings.json``; it must hold ``grid``.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Begin or resume a dataset at ``path``.

        Raises:
            OutputError: the path cannot be written, or holds other files or a dataset with
                other settings.
        """
        self.path, self.settings = path, settings
        self.grid = grid_from_json(settings["grid"])
        before = self._existing()
        if before is None:
            make_directory(path)
            write_json(path / SETTINGS, settings)
        elif before != settings:
            differing = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            raise OutputError(
                f"{str(path)!r} holds a dataset that was made with other settings "
                f"({', '.join(differing)} differ). Choose another directory or remove it."
            )

    def _existing(self) -> dict[str, Any] | None:
        try:
            if not followed(self.path).exists():
                return None
            if not self.path.is_dir():
                raise OutputError(f"{str(self.path)!r} is a file, not a directory.")
            others = self._others()
        except OSError as error:
            raise explain(error, self.path) from error
        if not others and (self.path / SETTINGS).is_file():
            try:
                return read_settings(self.path)
            except DatasetError as error:
                raise OutputError(
                    f"{error} Nothing there was touched; choose another directory."
                ) from error
        if others:
            raise OutputError(
                f"{str(self.path)!r} holds something else ({', '.join(sorted(others)[:3])}). "
                "Nothing there was touched; choose another directory."
            )
        return None

    def _others(self) -> list[str]:
        """Names in the way: in a dataset, of its files those that are no regular files; elsewhere
        all but unfinished files of dfq's."""
        if (self.path / SETTINGS).is_file():
            own = DIRECTORY.names.fullmatch
            return [p.name for p in self.path.iterdir() if own(p.name) and not p.is_file()]
        return [
            p.name
            for p in self.path.iterdir()
            if not (TEMPORARY.fullmatch(p.name) and DIRECTORY.owns(p))
        ]

    def has(self, unit: int, shards: dict[int, int]) -> bool:
        """Whether all shards of a unit exist and are intact.

        ``shards`` maps the number of patches per image to the number of images.
        """
        for k, n in shards.items():
            path = self.path / shard_name(unit, k)
            try:
                content = path.read_bytes()
                images = decode_shard(content, self.grid, path.name)
            except (FileNotFoundError, DamagedError):
                return False
            except OSError as error:
                raise explain(error, path) from error
            if images.patches.shape[:2] != (n, k) or encode_shard(images) != content:
                return False
        return True

    def write(self, unit: int, images: list[SparseImages]) -> None:
        """Write a unit's images, one shard for each number of patches."""
        groups: dict[int, list[SparseImages]] = {}
        for batch in images:
            groups.setdefault(batch.patches.shape[1], []).append(batch)
        for k, batches in sorted(groups.items()):
            write_bytes(self.path / shard_name(unit, k), encode_shard(concatenate(batches)))

    def finish(self, units: list[dict[int, int]]) -> None:
        """Write the manifest, which completes the dataset, and remove unfinished
        files of processes that no longer run.

        ``units`` holds each unit's shards as in :meth:`has`.
        """
        shards = []
        for unit, sizes in enumerate(units):
            for k, n in sizes.items():
                content = (self.path / shard_name(unit, k)).read_bytes()
                shards.append(
                    {
                        "name": shard_name(unit, k),
                        "images": n,
                        "patches": k,
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
                )
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "images": sum(sum(sizes.values()) for sizes in units),
            "shards": shards,
        }
        remove_abandoned(self.path, DIRECTORY)
        write_json(self.path / MANIFEST, manifest)


def concatenate(batches: list[SparseImages]) -> SparseImages:
    """Concatenate images with equal numbers of patches, ordered by trajectory, then stage."""
    joined = join(batches)
    key = joined.trajectory * (int(joined.stage.max()) + 1) + joined.stage
    return joined[key.argsort(stable=True)]


@dataclass(frozen=True)
class Shard:
    """Entry of the manifest."""

    name: str
    images: int
    patches: int
    sha256: str


class SparseImageDataset:
    """Finished dataset, opened for reading; shards are read one at a time."""

    def __init__(self, path: str | Path) -> None:
        """Open a dataset directory.

        Raises:
            DatasetError: the directory is no dataset, or an unfinished one, or of an unknown
            version.
        """
        self.path = Path(path)
        self.settings = read_settings(self.path)
        manifest_path = self.path / MANIFEST
        if not manifest_path.is_file():
            raise DatasetError(
                f"The dataset {str(self.path)!r} is unfinished: it has no {MANIFEST}. "
                "Run the command that makes it again; it goes on where it stopped."
            )
        manifest = read_object(manifest_path)
        check_header(manifest, manifest_path)
        try:
            self.shards = tuple(_shard(entry) for entry in manifest["shards"])
            self.grid = grid_from_json(self.settings["grid"])
            if not self.shards:
                raise ValueError("no shards")
            units = [(_unit(s), s.patches) for s in self.shards]
            if any(b <= a for a, b in pairwise(units)):
                raise ValueError("shards that are not in order, or one of them twice")
            images = manifest["images"]
            if type(images) is not int or sum(s.images for s in self.shards) != images:
                raise ValueError("images")
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{str(self.path)!r}: a malformed field ({error}).") from error
        self.inversion = inversion_of(self.settings, self.path)
        """Inversion settings of the images; None for images from other sources."""

    def __len__(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def method(self) -> str:
        """Name of the method that made the images."""
        return str(self.settings.get("inversion", {}).get("method", "unknown"))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model that the images were made from."""
        return str(self.settings.get("model", {}).get("fingerprint", ""))

    @cached_property
    def bytes(self) -> int:
        """Size on disk in bytes."""
        return sum(p.stat().st_size for p in self.path.iterdir() if p.is_file())

    def read(self, shard: Shard) -> SparseImages:
        """Read a shard.

        Raises:
            DamagedError: the file is missing or damaged.
        """
        path = self.path / shard.name
        try:
            if path.exists() and not path.is_file():
                raise DamagedError(f"{str(path)!r} is no regular file.")
            content = path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise DamagedError(
                f"{str(path)!r} is damaged: its SHA-256 is not the one in {MANIFEST}. "
                "Remove the dataset (`dfq cache remove`, if it is in the cache) and make it again."
            )
        images = decode_shard(content, self.grid, str(path))
        if images.patches.shape[:2] != (shard.images, shard.patches):
            raise DamagedError(f"{str(path)!r} does not hold what {MANIFEST} says.")
        bound, largest = label_bound(self.settings), int(images.labels.max())
        if bound is not None and largest >= bound:
            raise DamagedError(
                f"{str(path)!r} has a label of {largest}; the model has the classes 0 to "
                f"{bound - 1}."
            )
        return images

    def _shards(self) -> Iterator[tuple[Shard, SparseImages]]:
        """Read every shard in order; no image may occur twice.

        Raises:
            DamagedError: a shard is damaged, two images have the same trajectory and stage, or
                those of a shard are not in order.
        """
        seen = set[tuple[int, int]]()
        for shard in self.shards:
            images = self.read(shard)
            pairs = list(zip(images.trajectory.tolist(), images.stage.tolist(), strict=True))
            if not seen.isdisjoint(pairs) or len(set(pairs)) < len(pairs):
                raise DamagedError(
                    f"{str(self.path / shard.name)!r} repeats a pair of trajectory and stage."
                )
            if pairs != sorted(pairs):
                raise DamagedError(
                    f"{str(self.path / shard.name)!r} has images that are not in order."
                )
            seen.update(pairs)
            yield shard, images

    def verify(self) -> None:
        """Read and check every shard, as iterating does.

        Raises:
            DamagedError: a shard is damaged, two images have the same trajectory and stage, or
                those of a shard are not in order.
        """
        for _ in self._shards():
            pass

    def units(self) -> Iterator[list[SparseImages]]:
        """Yield the images of each unit of work; a trajectory lies within one unit."""
        for _, shards in groupby(self._shards(), key=lambda pair: _unit(pair[0])):
            yield [images for _, images in shards]

    def batches(self, size: int) -> Iterator[SparseImages]:
        """Yield batches of at most ``size`` images with equal numbers of patches, in stored
        order."""
        for _, images in self._shards():
            for start in range(0, len(images), size):
                yield images[start : start + size]


def _unit(shard: Shard) -> int:
    return int(shard.name.split("-")[1])


def _shard(entry: Any) -> Shard:
    shard = Shard(entry["name"], entry["images"], entry["patches"], entry["sha256"])
    valid = (
        isinstance(shard.name, str)
        and SHARD_NAME.fullmatch(shard.name) is not None
        and all(type(v) is int and 0 < v < 1 << 31 for v in (shard.images, shard.patches))
        and shard.name == shard_name(_unit(shard), shard.patches)
    )
    if not valid:
        raise ValueError(f"shard {entry!r:.120}")
    return shard
