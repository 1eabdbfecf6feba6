"""``gpu-check`` on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.core.tables import GPU_PARTS, gpu_tables
from calibration_bench.experiments.gpu_check import experiment as gpu_check
from calibration_bench.experiments.gpu_check.experiment import Options
from calibration_bench.measure import gpu

CHECK = registry.entry("gpu-check")
CPU = torch.device("cpu")


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_rehearsal_measures_every_part(tmp_path: Path) -> None:
    outcome = run(CHECK, Options(device="cpu", tiny=True), tmp_path, Heard())
    rows = outcome["rows"]
    assert [row for row in rows if "error" in row] == []
    by_part = {part: [r for r in rows if r["part"] == part] for part in gpu_check_parts()}
    assert {part: len(same) for part, same in by_part.items()} == {
        "gptq": 1,
        "iteration": 2,
        "quantize": 3,
        "inversion": 1,
        "inference": 2,
    }
    assert by_part["gptq"][0]["equal_share"] == 1
    for row in by_part["iteration"]:
        assert row["largest_difference"] < 0.5
        assert row["over_gradient"] > 0
    for row in by_part["quantize"]:
        assert 0 < row["quantize"] < row["without_loading"] < row["total"]
    for row in by_part["inference"]:
        assert row["absent"] == []
        assert row["over_bf16"] == row["dfq"] / row["torch_bf16"]
    assert len(outcome["tables"]) == 5
    for part, columns in GPU_PARTS.items():
        computed = {n for n in columns if n.startswith("against_") or n.endswith("_compiled")}
        measured = {*by_part[part][0], *computed, "error"}
        assert columns.keys() <= measured, part
    assert by_part["gptq"][0]["equal_scales"] == 1
    assert "equal_scales" in GPU_PARTS["gptq"]


def gpu_check_parts() -> list[str]:
    return list(gpu_check.PARTS)


def test_a_part_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(gpu, "gptq", fail)
    monkeypatch.setattr(gpu_check, "random_model", lambda *_: None)
    options = Options(device="cpu", tiny=True, parts="gptq")
    (row,) = run(CHECK, options, tmp_path, Heard())["rows"]
    assert row["error"] == "RuntimeError: out of order"
    assert not row["complete"]


def test_ratios_are_those_of_one_batch() -> None:
    shared = {"part": "inversion", "model": "m", "device": "d", "precision": "p"}

    def row(who: str, method: str, batch: int, seconds: float) -> dict[str, object]:
        own = {"implementation": who, "method": method, "batch": batch}
        return {**shared, **own, "seconds_per_image": seconds}

    rows = [row("dfq", "pri4", 8, 2.0), row("official", "dmi", 8, 60.0), row("dfq", "dmi", 64, 9.0)]
    (table,) = gpu_tables(rows)
    assert table.rows[0]["against_official_dmi"] == 30
    assert table.rows[0]["against_own_dmi"] is None
    assert table.rows[1]["against_official_dmi"] == 1


def test_errors_of_rounding_are_weighted_by_the_inputs() -> None:
    actual = gpu.gptq(8, 48, 32, 0.1, CPU)
    assert actual["error_ratio"] == 1
    assert actual["launches"] is None
