"""Time of inversion, and its extrapolation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.core.tables import speed_tables
from calibration_bench.experiments.inversion_speed.experiment import Options
from calibration_bench.measure.measure import PeakMemory, Stages, Trace
from calibration_bench.measure.methods import Method
from calibration_bench.measure.official import PACKAGES, Official, code
from dfq.errors import SettingError

SPEED = registry.entry("inversion-speed")


class Heard:
    """Notes that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def small(**changes: object) -> Options:
    options: dict[str, object] = {
        "models": "vit_tiny_patch16_224@32",
        "methods": "dmi,pri2",
        "iterations": 40,
        "iterations_per_stage": 3,
        "warmup": 1,
        "unit_size": 2,
        "threads": 1,
        "precision": "float32",
        "memory": False,
    }
    return Options(**{**options, **changes})  # type: ignore[arg-type]


def test_a_run_of_known_times_is_predicted_exactly() -> None:
    moments = [0.0, 3, 5, 7, 17, 18, 19, 19.5]  # 2 s an iteration, then 1 s; selection takes 9 s
    trace = Trace.of(moments, [3, 3])
    stages = Stages(1, [trace, trace])
    assert stages.seconds() == [2, 1]
    assert stages.overhead() == 1 + 9 + 0.5
    assert stages.predict([3, 3]) == moments[-1]
    assert stages.predict([100, 200]) == 400 + 10.5
    assert stages.timed() == 4
    assert stages.spread() == 0


def test_a_trace_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 iterations were timed, not 3"):
        Trace.of([0, 1, 2, 3], [3])


def test_speed_of_a_tiny_vit(tmp_path: Path) -> None:
    notes = Heard()
    outcome = run(SPEED, small(), tmp_path, notes)
    assert [(r["implementation"], r["method"]) for r in outcome["rows"]] == [
        ("dfq", "dmi"),
        ("dfq", "pri2"),
    ]
    assert any("--official" in line for line in notes.lines)
    for row in outcome["rows"]:
        assert row["seconds_per_image"] > 0
        assert row["rounds_done"] == 2
        assert row["timed_per_stage"] == 4
        assert sum(s["length"] for s in row["stages"]) == 40
    # contenders take turns
    rounds = [line for line in notes.lines if line.startswith("round")]
    assert [line.split()[-2] for line in rounds] == ["dmi", "pri2", "dmi", "pri2"]


def test_precisions_race_beside_each_other(tmp_path: Path) -> None:
    options = small(methods="pri2", precision="bfloat16,float32,bfloat16", rounds=1)
    rows = run(SPEED, options, tmp_path, Heard())["rows"]
    assert [row["precision"] for row in rows] == ["bfloat16", "float32"]
    with pytest.raises(SettingError, match="--precision names 'int9'"):
        run(SPEED, small(precision="int9"), tmp_path, Heard())


def test_images_of_a_trajectory_share_its_time(tmp_path: Path) -> None:
    (row,) = run(SPEED, small(methods="pri2"), tmp_path, Heard())["rows"]
    total = sum(s["length"] * s["seconds_per_iteration"] for s in row["stages"])
    expected = total / (2 * 2) + row["overhead_seconds_per_image"]
    assert row["seconds_per_image"] == pytest.approx(expected)


def test_predictions_are_compared_with_whole_runs(tmp_path: Path) -> None:
    options = small(
        check_extrapolation=True,
        check_models="vit_tiny_patch16_224@32",
        check_iterations="20",
        rounds=1,
    )
    (row,) = run(SPEED, options, tmp_path, Heard())["rows"]
    assert row["kind"] == "check"
    assert row["actual_seconds_per_image"] > 0
    assert row["predicted_seconds_per_image"] > 0


def test_more_stages_than_patches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="only 4 patches"):
        run(SPEED, small(methods="pri5"), tmp_path, Heard())


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = small(models="test_vit@32", methods="dmi", memory=True, rounds=1)
    (row,) = run(SPEED, options, tmp_path, Heard())["rows"]
    assert row["complete"]
    assert row["memory_trajectories"] == 32
    assert 0 < row["peak_memory_mb"] < row["process_peak_mb"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_gone_again() -> None:
    memory = PeakMemory()
    torch.ones(16 * 2**20)
    assert memory.peak() - memory.before >= (64 if memory.reset else 0)


def test_ratios_are_against_the_official_rows_of_the_same_model() -> None:
    base = {
        "kind": "speed",
        "model": "m",
        "iterations": 4000,
        "threads": 1,
        "device": "cpu",
        "session": "1",
    }
    rows = [
        {**base, "implementation": i, "method": m, "seconds_per_image": s, "precision": p}
        for i, m, s, p in [
            ("dfq", "dmi", 4.0, "bfloat16"),
            ("dfq", "pri4", 0.5, "bfloat16"),
            ("official", "dmi", 10.0, "float32"),
            ("official", "smi", 5.0, "float32"),
        ]
    ]
    table = speed_tables(rows)[0]
    assert [row["against_official_dmi"] for row in table.rows] == [2.5, 20, 1, 2]
    assert [row["against_official_smi"] for row in table.rows] == [1.25, 10, 0.5, 1]
    assert [row["against_own_dmi"] for row in table.rows] == [1, 8, 1, 2]


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is not a checkout of Egg-Hu/SMI"):
        code(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_the_official_code_runs_and_leaves_no_trace() -> None:
    directory = os.environ.get("DFQ_OFFICIAL_SMI")
    if not directory:
        pytest.skip("a checkout of Egg-Hu/SMI is not here; name it with $DFQ_OFFICIAL_SMI")
    before, loader = set(sys.modules), torch.utils.data.DataLoader
    official = Official(Path(directory), "deit_tiny_patch16_224", 0, 1, "cpu")
    smi = Method("smi")
    real = smi.settings(iterations=4000, unit_size=1, precision="float32")
    trace = official.run(smi.short(real, 2), frozen=True)
    assert trace.lengths == (2,) * 5
    assert [stage.live for stage in official.stages(real)] == [196, 137, 95, 66, 46]
    assert not any(p.requires_grad for p in official.teacher.parameters())
    dmi = Method("dmi")
    official.run(dmi.short(real, 2), frozen=False)
    assert all(p.requires_grad for p in official.teacher.parameters())
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & set(PACKAGES)
    assert directory not in sys.path
    assert torch.utils.data.DataLoader is loader
