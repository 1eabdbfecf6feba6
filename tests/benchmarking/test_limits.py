"""Time limits of benchmarks, and results of interrupted ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import MEMBERS, checkpoint_of, quantized, spread
from typer.testing import CliRunner

import dfq
from dfq import environment
from dfq.benchmarking import compare, measuring
from dfq.benchmarking.runtimes import RUNTIMES, BenchmarkInputs, Predict, Runtime
from dfq.cli.app import app
from dfq.environment import isa
from dfq.errors import BenchmarkError, BenchmarkInterrupt, SettingError
from dfq.vit import ViT

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("limits") / "w8a8")


def install(
    monkeypatch: pytest.MonkeyPatch, name: str, predict: Predict, *packages: str, **options: Any
) -> None:
    monkeypatch.setitem(RUNTIMES, name, Runtime(lambda _: predict, packages, **options))


def at_batch(batch: int, act: Callable[[], Any]) -> Predict:
    """Runtime that calls ``act`` at one batch size and does nothing at others."""
    return lambda images: act() if len(images) == batch else None


def fail() -> None:
    raise RuntimeError("not enough memory\nfor this")


def interrupt() -> None:
    raise KeyboardInterrupt


# ---- time


def test_a_runtime_whose_first_batch_takes_too_long_is_one_marked_call(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.2)

    install(monkeypatch, "torch-bf16", at_batch(2, slow))
    names = ["dfq", "torch-bf16"]
    result = dfq.benchmark(checkpoint, batch=[1, 2], seconds=0.05, runtimes=names)
    assert {(r.runtime, r.batch): r.warm for r in result.rows}[("torch-bf16", 2)] is False
    (row,) = (r for r in result.rows if not r.warm)
    assert (row.calls, len(calls)) == (1, 1)
    assert row.median_ms >= 200
    assert "torch-bf16 *" in repr(result)
    assert "another did not fit into 0.05 s" in repr(result)


def test_the_first_call_of_what_compiles_does_not_count(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = iter([0.3])
    predict = at_batch(2, lambda: time.sleep(next(waits, 0)))
    install(monkeypatch, "dfq-compiled", predict, compiles=True)
    result = dfq.benchmark(checkpoint, batch=[2], seconds=0.05, runtimes=["dfq-compiled"])
    assert result.rows[0].warm
    assert result.rows[0].p95_ms < 300


def test_what_the_whole_run_has_no_time_for_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "dfq", lambda _: time.sleep(0.2))
    names = ["dfq", "torch-fp32"]
    result = dfq.benchmark(checkpoint, batch=[1], total_seconds=0.1, runtimes=names)
    assert result.rows == []
    assert [(a.runtime, a.batch) for a in result.absent] == [("torch-fp32", None), ("dfq", 1)]
    assert "time of the whole run (0.1 s) was over" in result.absent[0].reason


# ---- failures and Ctrl-C


def test_a_failure_keeps_the_other_rows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch-bf16", at_batch(2, fail))
    with pytest.raises(BenchmarkError, match="torch-bf16 at batch 2: not enough memory") as raised:
        dfq.benchmark(checkpoint, batch=[1, 2], seconds=0.01, runtimes=["dfq", "torch-bf16"])
    result = raised.value.result
    assert [(r.runtime, r.batch) for r in result.rows] == [
        ("dfq", 1),
        ("torch-bf16", 1),
        ("dfq", 2),
    ]
    (absent,) = result.absent
    assert (absent.runtime, absent.batch) == ("torch-bf16", 2)
    assert result.stopped == "torch-bf16 at batch 2: not enough memory"


def test_a_failure_of_another_tool_is_no_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "openvino-dfq", at_batch(2, fail), "torch")
    names = ["dfq", "openvino-dfq"]
    result = dfq.benchmark(checkpoint, batch=[1, 2], seconds=0.01, runtimes=names)
    assert [(a.runtime, a.batch) for a in result.absent] == [("openvino-dfq", 2)]
    assert result.stopped is None


def test_an_interrupt_keeps_the_rows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch-bf16", at_batch(2, interrupt))
    with pytest.raises(KeyboardInterrupt) as raised:
        dfq.benchmark(checkpoint, batch=[1, 2], seconds=0.2, runtimes=["dfq", "torch-bf16"])
    assert isinstance(raised.value, BenchmarkInterrupt)
    result = raised.value.result
    assert [(r.runtime, r.batch) for r in result.rows] == [("dfq", 1), ("torch-bf16", 1)]
    assert result.stopped == "it was interrupted"


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    words = ["benchmark", *args, "--seconds", "0.01", "--runtimes", "dfq,torch-bf16"]
    monkeypatch.setattr(sys, "argv", ["dfq", *words])
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize(("act", "code"), [(interrupt, 130), (fail, 1)], ids=["ctrl-c", "failure"])
def test_the_command_shows_what_was_measured(
    act: Callable[[], None], code: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "torch-bf16", at_batch(2, act))
    ended = command(monkeypatch, str(checkpoint), "--batch", "1,2", "--json")
    assert ended.exit_code == code
    printed = json.loads(ended.stdout)
    assert len(printed["rows"]) >= 2
    assert printed["stopped"]
    ended = command(monkeypatch, str(checkpoint), "--batch", "1,2")
    assert ended.exit_code == code
    assert "Stopped early" in ended.stdout


def test_an_interrupt_before_the_first_row_is_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "torch-bf16", at_batch(1, interrupt))
    ended = command(monkeypatch, str(checkpoint), "--batch", "1", "--json")
    assert ended.exit_code == 130
    assert json.loads(ended.stdout)["error"]["type"] == "KeyboardInterrupt"


# ---- devices


def test_a_gpu_has_runtimes_of_its_own() -> None:
    names = ["dfq", "torch-fp32", "torch-fp16", "torch-bf16", "torch-bf16-compiled"]
    assert compare._names(None, CUDA) == [*names, "torchao-int8", "torchao-int8-weights"]
    with pytest.raises(SettingError, match="'openvino-dfq' does not run on 'cuda'"):
        compare._names(["openvino-dfq"], CUDA)
    with pytest.raises(SettingError, match="'torch-fp16' does not run on 'cpu'"):
        compare._names(["torch-fp16"], torch.device("cpu"))


@pytest.mark.parametrize("given", ["cold", "save"])
def test_what_is_of_the_cpu_is_refused_on_a_gpu(given: str) -> None:
    options = {"cold": False, "save": False, given: True}
    with pytest.raises(SettingError, match=f"{given} is of the CPU"):
        compare._check_for_device(CUDA, ["dfq"], **options)


@pytest.mark.parametrize("name", ["torch-fp16", "torch-bf16-compiled"])
def test_runtimes_of_gpus_compute_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[ViT] = []
    monkeypatch.setattr(ViT, "compile", lambda self: compiled.append(self))
    model = quantized(MEMBERS[0].values[0], bits=8, attention="float")
    given = BenchmarkInputs(tmp_path, model, 1, tmp_path, tmp_path)
    logits = RUNTIMES[name].build(given)(given.images(4))
    assert spread(logits.float(), model(given.images(4))) < 0.3
    assert len(compiled) == (name == "torch-bf16-compiled")


# ---- what is recorded


@pytest.mark.skipif(
    any(not measuring.installed(p) for p in ("onnx", "onnxruntime")), reason="onnx is not installed"
)
def test_saved_speeds_choose_the_runtime_of_load(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "dfq", lambda _: time.sleep(0.2))
    names = ["dfq", "onnxruntime-dfq"]
    given: dict[str, Any] = {"batch": [1], "runtimes": names, "cache": tmp_path, "seconds": 0.5}
    dfq.benchmark(checkpoint, **given)
    assert list(tmp_path.iterdir()) == []
    result = dfq.benchmark(checkpoint, save=True, **given)
    assert result.saved == {1: "onnxruntime"}
    assert "dfq.load runs on onnxruntime from now on" in repr(result)
    assert dfq.load(checkpoint, cache=tmp_path).backend == "onnxruntime"


def test_saving_needs_the_row_to_compare_with(checkpoint: Path) -> None:
    with pytest.raises(SettingError, match="save compares with 'dfq'"):
        dfq.benchmark(checkpoint, save=True, runtimes=["torch-fp32"])


def test_the_isa_is_what_onednn_reports(checkpoint: Path) -> None:
    result = dfq.benchmark(checkpoint, batch=[1], seconds=0.01, runtimes=["dfq"])
    assert result.isa == isa()
    assert result.isa["pytorch"] == torch.backends.cpu.get_cpu_capability()
    if torch.backends.mkldnn.is_available():
        assert f"onednn {result.isa['onednn']}" in " ".join(repr(result).split())


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()),
    reason="oneDNN has no choice here",
)
def test_the_isa_follows_the_environment() -> None:
    code = "from dfq.environment import isa; import json; print(json.dumps(isa()))"
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **limits},
        cwd=Path(environment.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(ended.stdout)
    assert (printed["pytorch"], printed["onednn"]) == ("AVX2", "Intel AVX2")
