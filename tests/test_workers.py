"""Several processes that make one dataset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = [
    *("--img-size", "32", "--images", "5", "--iterations", "4", "--stages", "2"),
    *("--threads", "1", "--quiet"),
]


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('[inversion]\nunit_size = 1\nprecision = "float32"\n')
    return path


def invert(workers: int, weights: Path, out: Path, tmp_path: Path) -> None:
    launcher = [sys.executable]
    if workers > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(workers)]
    command = ["-m", "dfq", "invert", "vit_tiny_patch16_224", "--weights", str(weights)]
    files = ["--out", str(out), "--recipe", str(recipe(tmp_path))]
    done = subprocess.run(
        [*launcher, *command, *OPTIONS, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, weights_file: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    invert(1, weights_file, alone, tmp_path)
    invert(workers, weights_file, shared, tmp_path)
    assert contents(shared) == contents(alone)
    assert len(list(alone.glob("shard-*"))) == 3
