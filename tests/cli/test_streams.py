"""Every verb with standard streams that are closed, full, broken or ASCII."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import dfq
from dfq.cli.app import app
from dfq.cli.streams import settle
from dfq.cli.terminal import out_console

FAST = ["--iterations", "2", "--images", "2", "--stages", "1", "--threads", "1"]


class Device(io.RawIOBase):
    """File of a standard stream: memory, or a full disk."""

    def __init__(self, *, full: bool = False) -> None:
        self.full, self.content = full, b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.content += bytes(data)
        return len(data)


def broken_pipe() -> io.FileIO:
    """Pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    return io.FileIO(write, "w")


Raw = io.RawIOBase | None


def text(raw: Raw, encoding: str) -> io.TextIOWrapper | None:
    return None if raw is None else io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding)


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


class Place:
    """Runner of verbs in this process, with files in a directory of any name."""

    def __init__(
        self, root: Path, weights: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.root, self.weights, self.checkpoint = root, weights, checkpoint
        self.monkeypatch = monkeypatch

    @property
    def model(self) -> list[str]:
        return ["test_vit", "--weights", str(self.weights), "--img-size", "32"]

    def run(self, words: list[str], out: Raw, err: Raw, encoding: str = "utf-8") -> Ended:
        """Run a verb as ``dfq`` does; a stream that is None is closed."""
        with self.monkeypatch.context() as patch:
            given = [text(raw, encoding) for raw in (out, err)]
            patch.setattr(sys, "stdout", given[0])
            patch.setattr(sys, "stderr", given[1])
            patch.setattr(out_console, "quiet", False)  # rich's, after a broken pipe
            settle()
            with pytest.raises(SystemExit) as ended:
                app(words)
            for stream in filter(None, (sys.stdout, sys.stderr, *given)):
                stream.close()
        contents = (getattr(raw, "content", b"") for raw in (out, err))
        return Ended(int(ended.value.code or 0), *(c.decode(encoding) for c in contents))


@pytest.fixture(scope="module")
def small_checkpoint(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    dfq.quantize(
        "test_vit",
        weights=small_weights,
        img_size=32,
        calibration="noise",
        images=2,
        out=path / "w8a8",
        cache=path / "cache",
    )
    return path / "w8a8"


@pytest.fixture
def place(
    tmp_path: Path, small_weights: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    return Place(tmp_path, small_weights, small_checkpoint, monkeypatch)


def data(place: Place) -> str:
    path = place.root / "x.npz"
    np.savez(path, x=np.zeros((2, 32, 32, 3), np.uint8), y=np.arange(2))
    return str(path)


def export(place: Place) -> list[str]:
    pytest.importorskip("onnx")
    return ["export", str(place.checkpoint), "--out", str(place.root / "x.onnx")]


VERBS: dict[str, Callable[[Place], list[str]]] = {
    "quantize": lambda p: [
        *("quantize", *p.model, *FAST, "--calibration", "noise", "--out", str(p.root / "q"))
    ],
    "invert": lambda p: ["invert", *p.model, *FAST, "--out", str(p.root / "i")],
    "evaluate": lambda p: ["evaluate", str(p.checkpoint), "--data", data(p)],
    "distill": lambda p: [
        *("distill", *p.model, "--data", "noise", "--images", "2", "--steps", "1"),
        *("--depth", "1", "--out", str(p.root / "s")),
    ],
    "export": export,
    "benchmark": lambda p: [
        *("benchmark", str(p.checkpoint), "--batch", "1", "--seconds", "0.01"),
        *("--runtimes", "dfq"),
    ],
    "inspect": lambda p: ["inspect", str(p.checkpoint)],
    "models": lambda _: ["models", "vit_base"],
    "doctor": lambda _: ["doctor"],
    "cache": lambda _: ["cache", "list"],
    "version": lambda _: ["--version"],
    "help": lambda _: ["inspect", "--help"],
}

QUIET = ("quantize", "invert", "evaluate", "distill", "export", "benchmark")
JSON = tuple(verb for verb in VERBS if verb not in ("version", "help"))

every_verb = pytest.mark.parametrize("verb", VERBS)


@every_verb
def test_a_full_stderr_changes_nothing(verb: str, place: Place) -> None:
    ended = place.run(VERBS[verb](place), Device(), Device(full=True))
    assert ended.code == 0
    assert ended.stdout


@every_verb
def test_a_closed_stderr_changes_nothing(verb: str, place: Place) -> None:
    ended = place.run(VERBS[verb](place), Device(), None)
    assert ended.code == 0
    assert ended.stdout


@every_verb
def test_a_full_stdout_is_an_error(verb: str, place: Place) -> None:
    ended = place.run(VERBS[verb](place), Device(full=True), Device())
    assert ended.code == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "error: Cannot write to standard output: No space left on device."


@every_verb
def test_a_closed_stdout_is_refused_before_any_work(verb: str, place: Place) -> None:
    words = VERBS[verb](place)
    before = sorted(place.root.iterdir())
    ended = place.run(words, None, Device())
    assert ended.code == 2
    assert ended.stderr.startswith("error: Standard output is closed")
    assert ended.stderr.count("\n") == 1
    assert sorted(place.root.iterdir()) == before


@pytest.mark.parametrize("verb", JSON)
def test_json_needs_an_open_stdout(verb: str, place: Place) -> None:
    quiet = ["--quiet"] if verb in QUIET else []
    ended = place.run([*VERBS[verb](place), "--json", *quiet], None, Device())
    assert ended.code == 2
    assert ended.stderr.startswith("error: Standard output is closed")


@pytest.mark.parametrize("verb", QUIET)
def test_quiet_needs_no_stdout(verb: str, place: Place) -> None:
    ended = place.run([*VERBS[verb](place), "--quiet"], None, Device())
    assert (ended.code, ended.stderr) == (0, "")


@every_verb
def test_a_broken_pipe_ends_quietly(verb: str, place: Place) -> None:
    ended = place.run(VERBS[verb](place), broken_pipe(), Device())
    assert ended.code == 1
    assert "rror" not in ended.stderr


@every_verb
def test_ascii_is_enough(verb: str, place: Place) -> None:
    place.root = place.root / "ä\udcff"  # the second is a byte that is no UTF-8
    place.root.mkdir()
    ended = place.run(VERBS[verb](place), Device(), Device(), encoding="ascii")
    assert ended.code == 0
    assert ended.stdout.isascii()
    lines = [line for line in ended.stdout.splitlines() if line.startswith(("|", "+"))]
    assert len({len(line) for line in lines}) <= 1, "a table is as wide everywhere"
    if verb in ("quantize", "invert", "distill", "export"):
        assert "\\xe4\\udcff" in re.sub(r"[\s|]", "", ended.stdout)


STREAMS: dict[str, Callable[[], Raw]] = {
    "open": Device,
    "full": lambda: Device(full=True),
    "broken": broken_pipe,
    "closed": lambda: None,
}


@pytest.mark.parametrize("out", STREAMS)
@pytest.mark.parametrize("err", STREAMS)
@pytest.mark.parametrize("json_", [False, True])
@pytest.mark.parametrize("words", [["inspect", "nöne"], ["inspect"], ["quantise"]], ids=" ".join)
def test_a_mistake_exits_with_2_whatever_the_streams_are(
    words: list[str], json_: bool, err: str, out: str, place: Place
) -> None:
    words = [*words, "--json"] if json_ else words
    assert place.run(words, STREAMS[out](), STREAMS[err](), "ascii").code == 2


def test_weights_images_and_datasets_have_names_of_any_bytes(
    place: Place, small_weights: Path
) -> None:
    root = place.root / "\udcff"
    root.mkdir()
    place.weights = root / "w\udcff.safetensors"
    place.weights.write_bytes(small_weights.read_bytes())
    images = [*("invert", *place.model, *FAST, "--out"), str(root / "i")]
    assert place.run(images, Device(), Device()).code == 0
    for _ in range(2):  # the second replaces the first, having read it
        words = [*("quantize", *place.model, "--calibration", str(root / "i"))]
        ended = place.run([*words, "--out", str(root / "q"), "--json"], Device(), Device())
        assert ended.code == 0
        assert json.loads(ended.stdout)["checkpoint"] == str(root / "q")
    facts = dfq.inspect(root / "q")
    assert facts["report"]["calibration"]["path"].endswith("\\udcff/i")


# ---- descriptors: processes of their own


def shell(command: str) -> tuple[str, str]:
    ended = subprocess.run(
        ["sh", "-c", command.replace("dfq ", f"'{sys.executable}' -m dfq ")],
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stdout, ended.stderr


REFUSED = "error: Standard output is closed, so the result cannot be printed; "


@pytest.mark.skipif(os.name != "posix", reason="redirections are the shell's")
@pytest.mark.parametrize(
    ("command", "out", "err"),
    [
        ("dfq --version >&-; echo $? >&2", "", REFUSED),
        ("dfq --version 2>&-; echo $?", f"dfq {dfq.__version__}\n0\n", ""),
        ("dfq --version <&- 2>&-; echo $?", f"dfq {dfq.__version__}\n0\n", ""),
        ("dfq quantise 2>&-; echo $?", "2\n", ""),
        ("dfq quantise >&- 2>&-; echo $? >&2", "", "2\n"),
        ("(dfq --help; echo $? >&2) | true", "", "1\n"),
    ],
)
def test_a_process_without_a_stream(command: str, out: str, err: str) -> None:
    stdout, stderr = shell(command)
    assert stdout == out
    assert stderr.startswith(err)
    assert "Traceback" not in stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_process_with_full_streams() -> None:
    assert shell("dfq quantise --json 2>/dev/full; echo $? >&2")[1] == "2\n"
    assert shell("dfq --version >/dev/full 2>/dev/full; echo $?")[0] == "2\n"


@pytest.mark.skipif(os.name != "posix", reason="descriptors")
def test_a_closed_descriptor_is_no_files() -> None:
    program = (
        "from dfq.cli.streams import settle; settle(); import os, sys; "
        "opened = open(os.devnull); sys.exit(100 + opened.fileno())"
    )
    ended = subprocess.run(["sh", "-c", f"'{sys.executable}' -c '{program}' <&- >&- 2>&-"])
    assert ended.returncode >= 103
