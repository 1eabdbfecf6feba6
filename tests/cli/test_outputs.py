"""Outputs that the command line replaces, and those that it does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli
from trees import tree

import dfq


def test_a_checkpoint_with_files_of_the_users_stays(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("years of work")
    before = tree(tmp_path)
    ended = cli.quantize(tmp_path / "out")
    assert ended.code == 2
    assert "also holds 'notes.txt'" in ended.stderr
    assert tree(tmp_path) == before


def test_what_a_terminal_obeys_is_printed_as_text(
    cli: Cli, cli_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(cli_checkpoint, tmp_path / "c")
    config = json.loads((cli_checkpoint / "config.json").read_text())
    config["model"] = "a\x1b[31mb"
    config["source"]["\x1b]0;title\x07"] = "[bold]x"
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    shown = cli("inspect", tmp_path / "c").stdout
    assert "\x1b" not in shown
    assert "\\x1b[31mb" in shown
    ended = cli("quantize", "x\x1b[31m", "--out", tmp_path / "out")
    assert "\x1b" not in ended.stderr


def test_a_dataset_is_calibrated_on_whole(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    few = ("--images", "3", "--calibration", tmp_path / "images")
    ended = cli("quantize", *cli.model, "--out", tmp_path / "out", *few)
    assert ended.code == 2
    assert "images is 3, but the dataset" in ended.stderr


def test_a_checkpoint_is_replaced_with_a_note(cli: Cli, tmp_path: Path) -> None:
    note = "holds test_vit w8a8, which will be replaced"
    assert note not in cli.quantize(tmp_path / "out").stderr
    assert note in cli.quantize(tmp_path / "out").stderr
    assert note in cli.quantize(tmp_path / "out", "--bits", "4").stderr


def test_a_checkpoint_does_not_replace_something_else(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out" / "more").mkdir(parents=True)
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    ended = cli.quantize(tmp_path / "out")
    assert ended.code == 2
    assert "Nothing there was touched" in ended.stderr
    assert tree(tmp_path) == before


def test_a_checkpoint_does_not_replace_another_programs_config(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "vit"}')
    before = tree(tmp_path)
    assert cli.quantize(tmp_path / "out").code == 2
    assert tree(tmp_path) == before


def test_a_checkpoint_does_not_replace_a_dataset(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    before = tree(tmp_path)
    assert cli.quantize(tmp_path / "images").code == 2
    assert tree(tmp_path) == before


def test_a_dataset_does_not_replace_something_else(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    ended = cli.invert("--out", tmp_path / "out")
    assert ended.code == 2
    assert "thesis.tex" in ended.stderr
    assert tree(tmp_path) == before


def test_a_dataset_does_not_replace_one_of_other_settings(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "out", "--seed", "0")
    before = tree(tmp_path)
    ended = cli.invert("--out", tmp_path / "out", "--seed", "1")
    assert ended.code == 2
    assert "other settings (inversion differ)" in ended.stderr
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ended = cli.quantize(tmp_path / "locked" / "out")
    assert ended.code == 2
    assert "Permission denied" in ended.stderr


def test_an_unreadable_image_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_text("not an image")
    ended = cli.quantize(tmp_path / "out", "--calibration", tmp_path / "images")
    assert ended.code == 2
    assert "x.png' cannot be read as an image" in ended.stderr


def test_an_interrupt_exits_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dfq, "invert", interrupt, raising=False)
    monkeypatch.setattr(dfq, "evaluate", interrupt, raising=False)
    ended = cli.invert()
    assert ended.code == 130
    assert "run the command again to resume" in ended.stderr
    ended = cli("evaluate", "x", "--data", "y", "--json")
    assert ended.code == 130
    assert ended.json["error"] == {"type": "KeyboardInterrupt", "message": "Interrupted."}
    assert "kept" not in ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=repr,
)
def test_full_memory_is_a_message(
    error: Exception, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(dfq, "invert", fail, raising=False)
    ended = cli.invert("--json")
    assert ended.code == 1
    assert ended.stderr.startswith("error: Out of memory")
    assert ended.json["error"]["type"] == "MemoryError"


def test_other_errors_are_not_hidden(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(dfq, "invert", fail, raising=False)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.invert()
