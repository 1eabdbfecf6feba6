"""``dfq.benchmark``: installed runtimes are measured, others are listed as absent."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_models import MEMBERS, checkpoint_of, quantized, spread
from families import Family
from saved_checkpoints import save
from typer.testing import CliRunner

import dfq
from dfq.benchmarking import cold, measuring
from dfq.benchmarking.measuring import row_of
from dfq.benchmarking.quiet import quiet
from dfq.benchmarking.runtimes import RUNTIMES, BenchmarkInputs, Runtime
from dfq.cli.app import app
from dfq.errors import SettingError
from dfq.extras import installed
from dfq.installation import install_command

OWN = ["dfq", "torch-fp32", "torch-bf16"]
USUAL = [n for n, runtime in RUNTIMES.items() if "cpu" in runtime.devices and not runtime.opt_in]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("benchmark") / "w4a8", bits=4)


def here(name: str) -> bool:
    return all(map(installed, RUNTIMES[name].packages))


# ---- what is measured


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> dfq.BenchmarkResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold, "REPEATS", 1)
        return dfq.benchmark(checkpoint, batch=[1, 3], seconds=0.02, threads=1, cold=True)


def test_every_runtime_is_measured_or_named(result: dfq.BenchmarkResult) -> None:
    measured = [name for name in USUAL if here(name)]
    assert [(r.runtime, r.batch) for r in result.rows] == [(n, b) for b in (1, 3) for n in measured]
    assert {a.runtime for a in result.absent} >= set(USUAL) - set(measured)
    assert set(OWN) <= set(measured)


def test_rows_are_speeds(result: dfq.BenchmarkResult) -> None:
    for row in result.rows:
        values = (row.images_per_second, row.median_ms, row.p95_ms)
        assert all(math.isfinite(v) and v > 0 for v in values)
        assert row.p95_ms >= row.median_ms


def test_the_result_says_where_it_was_measured(result: dfq.BenchmarkResult) -> None:
    assert (result.threads, result.scheme, result.seconds) == (1, "w4a8", 0.02)
    assert result.backend == dfq.load(result.checkpoint).backend
    assert result.versions["torch"] == torch.__version__
    assert result.cores == os.cpu_count()


def test_a_cold_start_takes_time_and_memory(result: dfq.BenchmarkResult) -> None:
    assert result.cold is not None
    assert [c.runtime for c in result.cold] == ["dfq"]
    assert result.cold[0].seconds > 0
    assert result.cold[0].peak_bytes > 50e6
    (reason,) = (a.reason for a in result.absent if a.runtime == "timm-fp32")
    assert "timm does not build it by its name" in reason


def test_a_model_of_timms_starts_beside(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "REPEATS", 1)
    out = tmp_path / "out"
    noise: dict[str, Any] = {"calibration": "noise", "images": 2}
    dfq.quantize("test_vit", weights=small_weights, img_size=32, out=out, **noise)
    measured = dfq.benchmark(out, batch=[1], seconds=0.01, runtimes=["dfq"], cold=True)
    assert measured.cold is not None
    assert [c.runtime for c in measured.cold] == ["dfq", "timm-fp32"]


def test_threads_of_the_caller_are_left_alone(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    dfq.benchmark(checkpoint, batch=[1], seconds=0.01, runtimes=["dfq"], threads=before + 1)
    assert torch.get_num_threads() == before


# ---- runtimes


@pytest.mark.parametrize("family", MEMBERS[::7])
@pytest.mark.parametrize("name", [n for n, r in RUNTIMES.items() if not r.compiles])
@torch.no_grad()
def test_every_runtime_runs_the_model(name: str, family: Family, tmp_path: Path) -> None:
    if not here(name):
        pytest.skip(f"{RUNTIMES[name].extra} is not installed")
    model = quantized(family, bits=8, attention="float")
    save(tmp_path / "checkpoint", model)
    given = BenchmarkInputs(tmp_path / "checkpoint", model, 1, tmp_path, tmp_path / "cache")
    images = given.images(4)
    with quiet():
        output = RUNTIMES[name].build(given)(images)
    logits = output if isinstance(output, torch.Tensor) else torch.from_numpy(np.array(output[0]))
    assert spread(logits.float(), model(images)) < (1 if name.endswith("-int8") else 0.3)


def test_images_are_random_pixels(tmp_path: Path) -> None:
    model = quantized(MEMBERS[0].values[0], bits=8, attention="float")
    given = BenchmarkInputs(tmp_path, model, 1, tmp_path, tmp_path)
    pixels = (given.images(4) * 0.25 + 0.4) * 255
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
    assert 0 <= float(pixels.min().round()) < 3
    assert 252 < float(pixels.max().round()) <= 255


def test_an_absent_package_is_named_with_its_extra(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = measuring.installed
    monkeypatch.setattr(
        measuring, "installed", lambda package: package != "onnxruntime" and installed(package)
    )
    names = ["dfq", "onnxruntime-dfq"]
    measured = dfq.benchmark(checkpoint, batch=[1], seconds=0.01, runtimes=names)
    assert [r.runtime for r in measured.rows] == ["dfq"]
    (absent,) = measured.absent
    assert absent.runtime == "onnxruntime-dfq"
    assert absent.reason == f"onnxruntime not installed: {install_command('onnx')}"


def test_a_tool_that_fails_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: BenchmarkInputs) -> Any:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(RUNTIMES, "openvino-dfq", Runtime(fail, ("torch",)))
    measured = dfq.benchmark(checkpoint, batch=[1], seconds=0.01, runtimes=["dfq", "openvino-dfq"])
    assert [(a.runtime, a.reason) for a in measured.absent] == [
        ("openvino-dfq", "it failed: no kernel")
    ]


def test_other_tools_are_kept_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        print("progress")
        assert os.environ["NNCF_CI"] == "1"
    print("result")
    assert capsys.readouterr().out == "result\n"
    assert "NNCF_CI" not in os.environ


# ---- timing


def test_a_row_is_throughput_and_quantiles() -> None:
    row = row_of("a", 8, [0.1] * 19 + [0.3])
    assert row.images_per_second == pytest.approx(8 * 20 / 2.2)
    assert (row.median_ms, row.p95_ms) == pytest.approx((100.0, 110.0))


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": [0]}, "batch has 0; it takes whole numbers from 1"),
        ({"batch": []}, "batch is empty"),
        ({"seconds": 0}, "seconds is 0; it is above 0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"threads": 0}, "threads is 0"),
        ({"runtimes": ["onnxruntime-dfg"]}, "Did you mean 'onnxruntime-dfq'"),
        ({"runtimes": []}, "names none"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_is_explained(changes: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(SettingError, match=message):
        dfq.benchmark(checkpoint, **changes)


# ---- the command


def command(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_json_is_the_result_and_nothing_else(checkpoint: Path) -> None:
    args = ("--batch", "1", "--seconds", "0.01", "--runtimes", "dfq,torch-fp32", "--json")
    ended = command("benchmark", str(checkpoint), *args)
    printed = json.loads(ended.stdout)
    assert [r["runtime"] for r in printed["rows"]] == ["dfq", "torch-fp32"]
    fields = {"runtime", "batch", "images_per_second", "median_ms", "p95_ms", "calls", "warm"}
    assert set(printed["rows"][0]) == fields
    assert {"absent", "cold", "processor", "versions", "threads", "isa", "stopped"} <= set(printed)


def test_the_table_has_ratios(checkpoint: Path) -> None:
    args = ("--batch", "1", "--seconds", "0.01", "--runtimes", "dfq,torch-fp32")
    ended = command("benchmark", str(checkpoint), *args)
    (line,) = (line for line in ended.stdout.splitlines() if "torch-fp32" in line)
    assert "1.00" in line


def test_batches_are_numbers(checkpoint: Path) -> None:
    ended = command("benchmark", str(checkpoint), "--batch", "one")
    assert ended.exit_code == 2
    assert "--batch is 'one'; give whole numbers" in ended.stderr
