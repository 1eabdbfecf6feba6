"""``dfq.load(..., tune=True)``: the fastest runtime, measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import checkpoint_of
from torch import Tensor

import dfq
from dfq.checkpoint import recorded_digest
from dfq.engines import load as loading
from dfq.engines import tuning
from dfq.engines.sessions import ENGINES
from dfq.engines.tuning import MARGIN, Choices, fastest, measure

pytestmark = pytest.mark.skipif(
    ENGINES["onnxruntime"].version is None, reason="onnxruntime is not installed"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("tuning") / "w8a8")


def choices(checkpoint: Path, cache: Path, threads: int | None = None) -> Choices:
    return Choices(recorded_digest(checkpoint), cache, threads or torch.get_num_threads())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes that were measured, with ONNX Runtime as the fastest."""
    batches: list[int] = []

    def fake(models: Mapping[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
        batches.append(len(images))
        return {name: 20.0 if name == "onnxruntime" else 10.0 for name in models}

    monkeypatch.setattr(loading, "measure", fake)
    return batches


def test_it_is_measured_once_and_auto_keeps_to_it(
    checkpoint: Path, tmp_path: Path, measured: list[int]
) -> None:
    assert dfq.load(checkpoint, cache=tmp_path).backend != "onnxruntime"
    for _ in range(2):
        assert dfq.load(checkpoint, tune=True, cache=tmp_path).backend == "onnxruntime"
    assert measured == [1]
    assert dfq.load(checkpoint, cache=tmp_path).backend == "onnxruntime"
    assert isinstance(dfq.load(checkpoint, runtime="torch", cache=tmp_path), dfq.QuantizedViT)
    assert dfq.load(checkpoint, compiled=True, cache=tmp_path).compiled


def test_batch_sizes_have_records_of_their_own(
    checkpoint: Path, tmp_path: Path, measured: list[int]
) -> None:
    dfq.load(checkpoint, tune=True, cache=tmp_path)
    dfq.load(checkpoint, tune=True, batch=3, cache=tmp_path)
    assert measured == [1, 3]
    assert set(choices(checkpoint, tmp_path).read()) == {1, 3}


def test_the_record_of_the_nearest_batch_size_decides(checkpoint: Path, tmp_path: Path) -> None:
    record = choices(checkpoint, tmp_path)
    assert record.recorded(1) is None
    record.save(1, {"torch": 10.0, "onnxruntime": 20.0})
    record.save(16, {"torch": 20.0, "onnxruntime": 10.0})
    chosen = [record.recorded(batch) for batch in (1, 3, 5, 16, 4096)]
    assert chosen == ["onnxruntime", "onnxruntime", "torch", "torch", "torch"]


def test_an_engine_wins_by_a_margin() -> None:
    assert fastest({"torch": 100.0, "openvino": 100.0 * MARGIN, "onnxruntime": 90}) == "openvino"
    assert fastest({"torch": 100.0, "openvino": 100.0 * MARGIN - 0.1}) == "torch"
    assert fastest({"torch": 100.0}) == "torch"


def test_a_record_is_of_one_machine_and_its_versions(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"torch": 10.0, "onnxruntime": 20.0}
    choices(checkpoint, tmp_path).save(1, speeds)
    assert choices(checkpoint, tmp_path).recorded(1) == "onnxruntime"
    assert choices(checkpoint, tmp_path, threads=61).recorded(1) is None
    others: dict[str, Callable[[], Any]] = {
        "processor": lambda: "Another CPU",
        "instructions": lambda: ("avx2",),
        "installed_engines": lambda: {"onnxruntime": "99.0"},
    }
    for name, other in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(tuning, name, other)
            assert choices(checkpoint, tmp_path).recorded(1) is None, name


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format": "dfq-choice", "measured": {"1": {"onnxruntime": 3}}}',
        '{"format": "dfq-choice", "measured": {"1": {"torch": 3, "rm -rf": 9}}}',
        '{"format": "dfq-choice", "measured": {"1": {"torch": 0}}}',
        '{"format": "dfq-choice", "measured": {"one": {"torch": 1}}}',
        '{"format": "dfq-choice", "measured": {"0": {"torch": 1}}}',
        '{"format": "dfq-choice", "measured": {" 1 ": {"torch": 1}}}',
        '{"format": "dfq-choice", "measured": {"1": {"torch": 1}, "01": {"torch": 2}}}',
        '{"format": "dfq-choice", "measured": {"1": {"torch": true}}}',
        '{"format": "dfq-choice", "measured": {"1": {"torch": "10"}}}',
        '{"format": "dfq-choice", "measured": {"1": {"torch": 1%s}}}' % ("0" * 400),
        '{"format": "dfq-choice", "measured": {"1%s": {"torch": 1}}}' % ("0" * 400),
        '{"format": "dfq-choice", "measured": [1]}',
    ],
)
def test_a_damaged_record_is_none(content: str, checkpoint: Path, tmp_path: Path) -> None:
    record = choices(checkpoint, tmp_path)
    record.save(1, {"torch": 10.0, "onnxruntime": 20.0})
    (path,) = tmp_path.glob("engines/*/choice-*.json")
    assert json.loads(path.read_text())["measured"] == {"1": {"torch": 10.0, "onnxruntime": 20.0}}
    path.write_text(content)
    assert record.recorded(1) is None


@pytest.mark.filterwarnings("ignore:runtime 'onnxruntime' was measured as the fastest")
def test_a_recorded_engine_that_does_not_open_leaves_torch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices(checkpoint, tmp_path).save(1, {"torch": 10.0, "onnxruntime": 20.0})

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(loading, "open_engine", fail)
    with pytest.warns(UserWarning, match="does not open"):
        model = dfq.load(checkpoint, cache=tmp_path)
    assert isinstance(model, dfq.QuantizedViT)


def test_everything_that_is_installed_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    dfq.load(checkpoint, tune=True, batch=2, cache=tmp_path)
    speeds = choices(checkpoint, tmp_path).read()[2]
    assert set(speeds) == {"torch", *(n for n, e in ENGINES.items() if e.version is not None)}
    assert all(speed > 0 for speed in speeds.values())


def test_an_engine_that_fails_is_left_out_and_torch_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.001)

    def fail(_: Tensor) -> None:
        raise RuntimeError("no memory")

    images = torch.zeros(2, 3, 4, 4)
    assert set(measure({"torch": torch.sum, "openvino": fail}, images)) == {"torch"}
    with pytest.raises(RuntimeError, match="no memory"):
        measure({"torch": fail, "openvino": torch.sum}, images)


def test_inspect_says_what_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path))
    assert dfq.inspect(checkpoint)["runtime"] == "torch"
    choices(checkpoint, tmp_path).save(1, {"torch": 10.0, "onnxruntime": 20.0})
    assert dfq.inspect(checkpoint)["runtime"] == "onnxruntime"
