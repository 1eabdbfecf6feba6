"""Worker processes that share a dataset."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from command_line import Cli

from dfq.errors import WorkerError
from dfq.pipeline.workers import Workers

OPTIONS = ["--images", "5", "--iterations", "4", "--stages", "2", "--threads", "1", "--quiet"]


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('[inversion]\nunit_size = 1\nprecision = "float32"\n')
    return path


def arguments(cli: Cli, out: Path, *more: str) -> list[str]:
    """Arguments of ``dfq invert``."""
    files = ["--out", str(out), "--recipe", str(recipe(out.parent))]
    return ["invert", *cli.model, *OPTIONS, *files, *more]


def launcher(workers: int) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, "--nproc-per-node", str(workers), "-m", "dfq"]


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_the_bytes_do_not_depend_on_the_number_of_workers(cli: Cli, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    command = [*launcher(3), *arguments(cli, shared)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert cli(*arguments(cli, alone)).code == 0
    assert contents(shared) == contents(alone)
    assert sum(name.startswith("shard-") for name in contents(shared)) == 3


def processes_below(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def test_a_worker_that_dies_stops_the_run_and_the_next_makes_the_rest(
    cli: Cli, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = ["--images", "40", "--iterations", "40"]
    assert cli(*arguments(cli, alone, *more)).code == 0
    command = [*launcher(2), *arguments(cli, shared, *more)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
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
    subprocess.run(command, capture_output=True, check=True)
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
