"""Plots of stored results."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibration_bench.core import registry
from calibration_bench.core.plotting import draw_plots
from calibration_bench.core.records import Store
from calibration_bench.core.registry import Curve, Measured, Plot
from calibration_bench.core.report import report
from dfq.errors import UsageError
from dfq.installation import install_command

CURVE = Curve("pri4", [8, 32, 128], [0.1, 0.05, 0.02], [0.01, 0.0, 0.002])
PLOT = Plot("a/b c", "Title", "x", "y", [CURVE], log_x=True, log_y=True)


def test_a_plot_is_a_picture_of_its_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    twice = [PLOT, PLOT, Plot("points", "Points", "x", "y", [CURVE], lines=False)]
    paths = draw_plots(twice, tmp_path / "plots")
    assert [p.name for p in paths] == ["a-b-c.png", "a-b-c--2.png", "points.png"]
    first, second, third = (p.read_bytes() for p in paths)
    assert first == second != third
    with Image.open(paths[0]) as picture:
        assert picture.size == (960, 600)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def row(source: str, count: int, seed: int) -> dict[str, Any]:
    return {
        "model": "m", "fingerprint": "f", "data": "d", "test_images": 9, "float_accuracy": 0.9,
        "threads": 1, "precision": "float32", "source": source, "iterations": 0, "images": count,
        "seed": seed, "bits": 4, "reduce_range": True, "accuracy": 0.9, "agreement": 0.9,
        "invert_seconds": 1.0,
        "dataset_bytes": 1000, "kl": 0.1 / count + 0.001 * seed,
    }  # fmt: skip


def test_the_report_draws_what_is_stored(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store = Store(tmp_path, "calibration-sources")
    hardware = {"processor": "p", "cores": 1, "threads": 1, "torch_capability": "c"}
    versions = {"torch": "t", "timm": "t", "dfq": "d", "dfq_code": "c"}
    session = {"date": "d", "hardware": hardware, "versions": versions, "seed": 0, "command": "c"}
    name = store.begin(session)
    for count in (8, 32):
        for seed in (0, 1):
            given = row("real", count, seed)
            key = {name: given[name] for name in ("source", "images", "seed")}
            store.put(Measured(key, given), name)
    text = report(tmp_path, tmp_path / "plots")
    (path,) = (tmp_path / "plots").iterdir()
    assert path.name == "sources-m-w4a8.png"
    assert f"![Calibration sources, m, W4A8, weights within -64..63]({path.as_posix()})" in text
    assert report(tmp_path).count("![") == 0
    (plot,) = registry.entry("calibration-sources").load().plots(store.rows())
    (curve,) = plot.curves
    assert list(curve.x) == [8, 32]
    assert list(curve.y) == pytest.approx([0.013, 0.003625])
    assert list(curve.error or []) == pytest.approx([0.0007071, 0.0007071], rel=1e-3)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=re.escape(install_command("report"))):
        draw_plots([PLOT], tmp_path)
