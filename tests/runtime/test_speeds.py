"""The choice between kernels of a GPU by measured speed, and its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dfq import runtime
from dfq.cache import cache_directory
from dfq.runtime import float_gemm, int_mm, speeds
from dfq.runtime.params import KernelRequirements
from dfq.runtime.speeds import Kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEEDS = KernelRequirements(64, 8, 768, 3072)

CANDIDATES = {
    "float": Kernels(float_gemm.prepack, float_gemm.linear),
    "int_mm": Kernels(int_mm.prepack, int_mm.linear),
}


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "_identity", lambda _: '{"card": "some"}')
    monkeypatch.setattr(speeds, "ROWS", 40)
    speeds._record.cache_clear()


@pytest.mark.parametrize(
    ("own", "other", "selected", "reason"),
    [
        (1e-4, 2e-4, "int_mm", None),
        (1.9e-4, 2e-4, "int_mm", None),
        (1.95e-4, 2e-4, "float", "measured 195 us for this shape, 'float' 200 us"),
        (3e-4, 2e-4, "float", "measured 300 us"),
        (None, 2e-4, "float", "refuses products"),
    ],
)
def test_the_faster_kernel_of_a_shape_is_selected(
    own: float | None,
    other: float,
    selected: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def found(*arguments: Any) -> speeds.Times:
        asked.append(arguments[:3])
        return {"int_mm": own, "float": other}

    monkeypatch.setattr(speeds, "seconds", found)
    assert selected == runtime.select(GPU, needs=NEEDS).NAME
    said = runtime.explain(GPU, NEEDS)["int_mm"]
    assert (said is None) if reason is None else (reason in str(said))
    assert set(asked) == {(GPU, 768, 3072)}
    assert runtime.select(GPU, "int_mm", NEEDS) is int_mm, "by name it can be had in any case"


def test_without_a_shape_or_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "seconds", None)
    assert "measured for each" in str(runtime.explain(GPU)["int_mm"])
    assert runtime.explain(CPU, NEEDS)["int_mm"] is not None
    assert runtime.select(GPU).NAME == "float"


def test_a_shape_is_measured_once_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = speeds.seconds(CPU, 16, 8, CANDIDATES)
    assert all(isinstance(value, float) and value > 0 for value in measured.values())
    path = speeds.record_path('{"card": "some"}', cache_directory())
    assert speeds.read_record(path) == {"16x8": measured}
    monkeypatch.setattr(speeds, "_measure", None)
    assert speeds.seconds(CPU, 16, 8, CANDIDATES) == measured
    speeds._record.cache_clear()  # as in another process
    assert speeds.seconds(CPU, 16, 8, CANDIDATES) == measured


def test_shapes_and_cards_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1, 9))
    monkeypatch.setattr(speeds, "_measure", lambda *_: float(next(times)))
    assert speeds.seconds(CPU, 16, 8, CANDIDATES) == {"float": 1.0, "int_mm": 2.0}
    assert speeds.seconds(CPU, 8, 16, CANDIDATES) == {"float": 3.0, "int_mm": 4.0}
    monkeypatch.setattr(speeds, "_identity", lambda _: '{"card": "other"}')
    assert speeds.seconds(CPU, 16, 8, CANDIDATES) == {"float": 5.0, "int_mm": 6.0}
    assert len(list((cache_directory() / speeds.DIRECTORY).iterdir())) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "x"}', '{"seconds": {"16x8": 3}}'])
def test_a_damaged_record_is_measured_again(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = speeds.record_path('{"card": "some"}', cache_directory())
    path.parent.mkdir(parents=True)
    path.write_text(content)
    monkeypatch.setattr(speeds, "_measure", lambda *_: 1.0)
    assert speeds.seconds(CPU, 16, 8, CANDIDATES) == {"float": 1.0, "int_mm": 1.0}
    assert speeds.read_record(path) == {"16x8": {"float": 1.0, "int_mm": 1.0}}


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(speeds, "_measure", lambda *_: 1.0)
    first = speeds.seconds(CPU, 16, 8, CANDIDATES)
    monkeypatch.setattr(speeds, "_measure", None)
    assert speeds.seconds(CPU, 16, 8, CANDIDATES) == first


def test_a_kernel_that_fails_has_no_time() -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    found = speeds.seconds(
        CPU, 16, 8, {"int_mm": Kernels(int_mm.prepack, refuse), "float": CANDIDATES["float"]}
    )
    assert found["int_mm"] is None
    assert found["float"] is not None
