"""Tables, ``repr`` and HTML of results."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from dfq.results.tables import facts_table, field_table
from dfq.results.values import (
    Bytes,
    CalibrationSource,
    EvaluateResult,
    InvertResult,
    QuantizeResult,
    Seconds,
)

INVERTED = InvertResult("demo", "pri", 8, "images", False, 75.2, 1000)
QUANTIZED = QuantizeResult(
    model="demo",
    scheme="w4a8",
    checkpoint="demo-w4a8",
    calibration=CalibrationSource("pri", 8, "images", False),
    seconds=Seconds(0.5, 3725.0, 61.0, 2.0, 59.0, 3847.5),
    bytes=Bytes(4000, 1000),
    agreement=None,
    accuracy=None,
    accuracy_top5=None,
    agreement_on=None,
    attention="float",
    layers=[],
)


def text_of(values: dict[str, object]) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(facts_table(values))
    return console.export_text()


def test_seconds_are_m_ss_from_a_minute_on() -> None:
    shown = " ".join(repr(QUANTIZED).replace("│", " ").split())
    assert "time load 0.5 s, invert 1:02:05, calibrate 1:01, quantize 2.0 s" in shown
    assert "evaluate 59.0 s, total 1:04:08" in shown
    assert "1:15" in repr(INVERTED)
    assert "time" in repr(INVERTED)


def test_json_stays_in_seconds() -> None:
    assert dataclasses.asdict(INVERTED)["seconds"] == 75.2


def test_empty_fields_are_left_out() -> None:
    shown = text_of(
        {"warnings": [], "facts": {}, "names": (), "none": None, "count": 0, "on": False}
    )
    assert not any(name in shown for name in ("warnings", "facts", "names", "none"))
    assert "count" in shown
    assert "on" in shown
    assert "layers" not in text_of({"recipe": {"bits": 4, "layers": [], "distillation": None}})


def test_sizes_by_name_have_units() -> None:
    shown = text_of({"bytes": {"float": 346_000_000, "w8a8": 1500}})
    assert "float 346.0 MB, w8a8 1.5 kB" in shown


@pytest.mark.parametrize("result", [INVERTED, QUANTIZED], ids=lambda r: type(r).__name__)
def test_html_is_the_table_of_repr(result: InvertResult | QuantizeResult) -> None:
    html = result._repr_html_()
    assert html.startswith("<pre>")
    assert html.endswith("</pre>")
    assert type(result).__name__ in html
    assert "demo" in html


def test_html_escapes_names() -> None:
    named = dataclasses.replace(
        INVERTED, model="<script>alert(1)</script>", path="a&b[bold]c\x1b[31m"
    )
    html = named._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a&amp;b[bold]c\\x1b[31m" in html
    assert "\x1b" not in html


def test_every_result_of_a_verb_has_html() -> None:
    assert all(hasattr(kind, "_repr_html_") for kind in (EvaluateResult, InvertResult))
    assert field_table(dataclasses.asdict(INVERTED)).row_count == 7
