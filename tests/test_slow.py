"""Verbs say at once what this processor is slow at, and only that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dfq
from dfq import device, slow
from dfq.slow import EMULATED, FLOAT32, TOO_WIDE, WITHOUT_AVX2, WITHOUT_VNNI

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAST = {"iterations": 2, "images": 2, "stages": 1, "threads": 1}


class Said:
    """Progress that keeps what it was told, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:  # noqa: ARG002
        self.lines.append(name)
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        self.lines.append(text)

    @property
    def warnings(self) -> list[str]:
        return [line.removeprefix("warning: ") for line in self.lines if "warning: " in line]


def processor(patch: pytest.MonkeyPatch, *, largest: int, bfloat16: bool) -> None:
    """One whose products are exact up to ``largest``, and that multiplies bfloat16 or not."""
    patch.setattr(device, "_worst_product_is_exact", lambda wanted: wanted <= largest)
    patch.setattr(device, "multiplies_bfloat16", lambda _: bfloat16)
    patch.setattr(slow, "multiplies_bfloat16", lambda where: where.type == "cpu" and bfloat16)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 alone."""
    processor(monkeypatch, largest=64, bfloat16=False)


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> None:
    """VNNI and bfloat16."""
    processor(monkeypatch, largest=127, bfloat16=True)


@pytest.mark.parametrize(
    ("largest", "weights", "expected"),
    [
        (127, 127, []),
        (64, 64, [WITHOUT_VNNI]),
        (64, 127, [TOO_WIDE]),
        (0, 64, [WITHOUT_AVX2]),
    ],
)
def test_integers(
    largest: int, weights: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, largest=largest, bfloat16=True)
    assert slow.slow_integers(CPU, weights) == expected
    assert slow.slow_integers(GPU, weights) == []


@pytest.mark.usefixtures("old")
def test_floats() -> None:
    assert slow.slow_floats(CPU, training="auto") == [FLOAT32]
    assert slow.slow_floats(CPU, training="bfloat16") == [EMULATED]
    assert slow.slow_floats(CPU, inversion="bfloat16") == [EMULATED]
    assert slow.slow_floats(CPU, training="auto", inversion="bfloat16") == [FLOAT32, EMULATED]
    assert slow.slow_floats(CPU, training="float32", inversion="int7") == []
    assert slow.slow_floats(GPU, training="auto", inversion="bfloat16") == []


@pytest.mark.parametrize("largest", [127, 64, 0])
def test_inversion_in_float32_is_slow(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, largest=largest, bfloat16=False)
    assert slow.slow_floats(CPU, inversion="auto") == [FLOAT32]
    assert slow.slow_floats(CPU, inversion="int7") == []


@pytest.fixture
def call(small_weights: Path, tmp_path: Path) -> Callable[..., tuple[Any, Said]]:
    def run(verb: str, **changes: Any) -> tuple[Any, Said]:
        said = Said()
        model = {"weights": small_weights, "img_size": 32}
        arguments: dict[str, Any] = {
            "quantize": {**model, **FAST, "out": tmp_path / "q"},
            "invert": {**model, **FAST, "out": tmp_path / "i"},
            "distill": {**model, **FAST, "steps": 1, "depth": 1, "out": tmp_path / "s"},
        }[verb]
        result = getattr(dfq, verb)("test_vit", **{**arguments, **changes}, progress=said)
        return result, said

    return run


@pytest.fixture
def checkpoint(small_weights: Path, tmp_path: Path) -> Path:
    made = dfq.quantize(
        "test_vit",
        weights=small_weights,
        img_size=32,
        calibration="noise",
        images=2,
        out=tmp_path / "c",
        settings={"inversion": {"iterations": 2, "stages": 1}},
    )
    return Path(made.checkpoint)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 32, 32, 3), np.uint8), y=np.arange(2))
    return tmp_path / "x.npz"


@pytest.mark.usefixtures("old")
def test_quantize_says_so_before_all_else(call: Callable[..., tuple[Any, Said]]) -> None:
    result, said = call("quantize", precision="bfloat16")
    assert said.lines[:2] == [f"warning: {EMULATED}", f"warning: {WITHOUT_VNNI}"]
    assert result.warnings[:2] == [EMULATED, WITHOUT_VNNI]
    assert said.warnings == result.warnings, "each once"
    assert dfq.inspect(result.checkpoint)["report"]["warnings"] == result.warnings


@pytest.mark.usefixtures("old")
def test_nothing_is_said_of_inversion_where_nothing_is_inverted(
    call: Callable[..., tuple[Any, Said]], data: Path
) -> None:
    result, _ = call("quantize", calibration="noise", eval=data, precision="bfloat16")
    assert EMULATED not in result.warnings
    _, said = call("invert", method="noise", precision="bfloat16")
    assert said.warnings == []


@pytest.mark.usefixtures("old")
def test_weights_of_the_full_range_are_named(call: Callable[..., tuple[Any, Said]]) -> None:
    result, _ = call("quantize", settings={"quantization": {"reduce_range": False}})
    assert result.warnings[:2] == [FLOAT32, TOO_WIDE]


@pytest.mark.usefixtures("old")
def test_invert_and_distill_say_so_before_all_else(call: Callable[..., tuple[Any, Said]]) -> None:
    _, said = call("invert", precision="bfloat16")
    assert said.lines[0] == f"warning: {EMULATED}"
    result, said = call("distill")
    assert said.lines[0] == f"warning: {FLOAT32}"
    assert said.warnings == result.warnings == [FLOAT32]


@pytest.mark.usefixtures("old")
def test_evaluate_and_benchmark_say_so_before_all_else(checkpoint: Path, data: Path) -> None:
    said = Said()
    result = dfq.evaluate(checkpoint, data=data, progress=said)
    assert said.lines[0] == f"warning: {WITHOUT_VNNI}"
    assert result.warnings[0] == WITHOUT_VNNI
    asked = dfq.evaluate(checkpoint, data=data, backend="reference")
    assert WITHOUT_VNNI not in asked.warnings
    said = Said()
    dfq.benchmark(checkpoint, batch=[1], seconds=0.01, runtimes=["dfq"], progress=said)
    assert said.lines[0] == f"warning: {WITHOUT_VNNI}"


@pytest.mark.usefixtures("new")
def test_a_fast_processor_is_told_nothing(call: Callable[..., tuple[Any, Said]]) -> None:
    texts = {FLOAT32, EMULATED, TOO_WIDE, WITHOUT_AVX2, WITHOUT_VNNI}
    for verb in ("quantize", "invert", "distill"):
        assert not texts & set(call(verb)[1].warnings)
    assert not texts & set(dfq.doctor().warnings)


@pytest.mark.usefixtures("old")
def test_the_doctor_says_the_same() -> None:
    assert dfq.doctor().warnings == (WITHOUT_VNNI, FLOAT32)
