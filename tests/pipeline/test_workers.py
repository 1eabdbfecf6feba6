"""Several processes that make one dataset."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from dfq.errors import WorkerError
from dfq.pipeline.workers import Workers

OPTIONS = [
    *("--img-size", "32", "--images", "5", "--iterations", "4", "--stages", "2"),
    *("--threads", "1", "--quiet"),
]


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('[inversion]\nunit_size = 1\nprecision = "float32"\n')
    return path


def command(
    workers: int, weights: Path, out: Path, tmp_path: Path, more: Sequence[str] = ()
) -> list[str]:
    launcher = [sys.executable]
    if workers > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(workers)]
    verb = ["-m", "dfq", "invert", "vit_tiny_patch16_224", "--weights", str(weights)]
    files = ["--out", str(out), "--recipe", str(recipe(tmp_path))]
    return [*launcher, *verb, *OPTIONS, *files, *more]


def invert(
    workers: int, weights: Path, out: Path, tmp_path: Path, more: Sequence[str] = ()
) -> None:
    done = subprocess.run(
        command(workers, weights, out, tmp_path, more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def of_one_process(
    weights_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files that a single process writes."""
    root = tmp_path_factory.mktemp("one")
    invert(1, weights_file, root / "images", root)
    return contents(root / "images")


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, weights_file: Path, tmp_path: Path, of_one_process: dict[str, bytes]
) -> None:
    invert(workers, weights_file, tmp_path / "shared", tmp_path)
    assert contents(tmp_path / "shared") == of_one_process
    assert sum(name.startswith("shard-") for name in of_one_process) == 3


def processes_below(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_worker_that_dies_stops_the_run_and_the_next_makes_the_rest(
    weights_file: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = ["--images", "40", "--iterations", "40"]
    invert(1, weights_file, alone, tmp_path, more)
    with subprocess.Popen(
        command(2, weights_file, shared, tmp_path, more), stderr=subprocess.PIPE, text=True
    ) as run:
        while not list(shared.glob("shard-*")):
            assert run.poll() is None
            time.sleep(0.02)
        os.kill(processes_below(run.pid)[0], signal.SIGKILL)
        _, errors = run.communicate()
    assert run.returncode != 0
    assert "SIGKILL" in errors
    assert not (shared / "manifest.json").exists()
    made = {p: p.stat().st_mtime_ns for p in shared.glob("shard-*")}
    assert made
    invert(2, weights_file, shared, tmp_path, more)
    assert contents(shared) == contents(alone)
    assert all(p.stat().st_mtime_ns == at for p, at in made.items())


def test_a_worker_that_waits_in_vain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("Connection closed by peer")

    workers = Workers()
    workers.size = 2
    monkeypatch.setattr(dist, "barrier", broken)
    with pytest.raises(WorkerError, match="run the same command again"):
        workers.wait()
