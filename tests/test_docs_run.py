"""Commands and programs in the README and in the documentation run as they are written.

``vit_base`` stands for any model: here for timm's test model with weights from a file.  Models,
calibration sets, training and timing are made small, nothing else is changed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import dfq
from dfq import demo
from dfq.cli.app import app
from dfq.engines import tuning
from dfq.extras import installed
from dfq.runtime import opaque
from dfq.vit import load

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

SMALLER = (
    (r"^(dfq (?:quantize|invert|distill) .*)", r"\1 --images 8 --iterations 4 --threads 1"),
    (r"^(dfq distill .*)", r"\1 --steps 2"),
    (r"^(dfq benchmark .*)", r"\1 --runtimes dfq,torch-fp32 --seconds 0.02"),
    (r" --cold\b", ""),
    (r" --min-agreement 0\.98\b", " --min-agreement 0.5"),
    (r"\bvit_(small_patch14_dinov2|base_patch16_224)\b", "test_vit"),
    (r" --img-size (224|384)\b", " --img-size 32"),
    (r"\bimages=64\b", "images=8"),
    (r"\b(dfq\.(?:quantize|invert|distill)\(.*?)\)", r"\1, iterations=4, threads=1)"),
    (r"\b(dfq\.distill\(.*?)\)", r"\1, images=8, steps=2)"),
    (r"\b(dfq\.benchmark\(.*?)\)", r'\1, runtimes=["dfq"], seconds=0.02)'),
)
"""Replacements that make commands and calls fast."""


def smaller(line: str) -> str:
    for pattern, replacement in SMALLER:
        line = re.sub(pattern, replacement, line)
    return line


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """Return language and lines of a page's code blocks."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [(language, text.splitlines()) for language, text in fenced]


def commands(lines: list[str]) -> list[str]:
    """Return the commands of dfq in a block, without redirections."""
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part.partition(" > ")[0] for part in parts if part.startswith("dfq ")]


def runs(block: tuple[str, list[str]]) -> bool:
    language, lines = block
    return language == "python" or bool(commands(lines))


def can_run(program: str) -> bool:
    """Whether the packages and tools of a program are installed."""
    if "openvino" in program and not installed("openvino"):
        return False
    if "onnx" in program and not installed("onnx"):
        return False
    if '"cuda"' in program and not torch.cuda.is_available():
        return False
    return "compiled=True" not in program or opaque.compiler() is not None


BEFORE = {
    "docs/deployment.md": ["dfq quantize vit_base --bits 4"],
    "docs/dataset-format.md": ["dfq invert vit_base --out DATASET"],
}
"""Commands that a page assumes to have run."""

Run = Callable[[str], str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_weights: Path) -> Path:
    """A directory with a user's images, weights and recipes, where ``vit_base`` can be loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my_vit.safetensors").symlink_to(small_weights)
    torch.save(load_file(small_weights), tmp_path / "my_vit.pth")
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "val" / f"class {number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with np.load(demo.TEST_SLICE) as content:
        np.savez(tmp_path / "few.npz", **{name: content[name][:20] for name in content.files})

    def pretrained(name: str, *_: Any, **__: Any) -> Any:
        model = timm.create_model(name, img_size=32, num_classes=5)
        model.load_state_dict(load_file(small_weights))
        return model

    monkeypatch.setattr(demo, "TEST_SLICE", tmp_path / "few.npz")
    monkeypatch.setattr(tuning, "SECONDS", 0.02)
    monkeypatch.setitem(load.ALIASES, "vit_base", "test_vit")
    monkeypatch.setattr(load, "_pretrained", pretrained)
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Commands in the working directory."""

    def command(text: str) -> str:
        words = shlex.split(smaller(text))[1:]
        ended = CliRunner().invoke(app, words)
        assert ended.exit_code == 0, f"{text}: {ended.stderr}"
        return ended.stdout

    return command


def test_the_steps_of_the_readme_run_in_their_order(run: Run, place: Path) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in lines if line[:2] == "| "]
    steps = [row[2:4] for row in rows if row[2].startswith("dfq ") or row[3].startswith("dfq.")]
    assert len(steps) == 10
    for command, call in steps:
        if command and can_run(command):
            run(command)
        if call.startswith("dfq.") and can_run(call):
            assert eval(smaller(call), {"dfq": dfq}) is not None
    for name in ("vit_base-w4a8/config.json", "images/manifest.json", "images.png"):
        assert (place / name).is_file()


def labels(text: str) -> list[str]:
    """Return the first cells of a two-column table, without continuation lines."""
    return [cell for cell in re.findall(r"^│ ([\w-]*) ", text, re.M) if cell]


@pytest.mark.usefixtures("place")
def test_the_sample_of_the_readme_has_the_rows_that_are_printed(run: Run) -> None:
    shown = labels((ROOT / "README.md").read_text())
    assert shown == labels(run("dfq quantize demo --bits 4 --eval demo"))
    assert "agreement" in shown


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))])
@pytest.mark.usefixtures("place")
def test_commands_and_programs_of_a_page_run_in_their_order(page: str, run: Run) -> None:
    for command in BEFORE.get(page, ()):
        run(command)
    names: dict[str, Any] = {"dfq": dfq, "torch": torch, "images": torch.zeros(2, 3, 32, 32)}
    for language, lines in blocks(page):
        if language == "python" and can_run("\n".join(lines)):
            exec("\n".join(map(smaller, lines)), names)
        for command in commands(lines) if not language else ():
            if "cache remove" not in command and can_run(command):
                run(command)
    assert names.get("logits", torch.zeros(2, 5)).shape == (2, 5)
