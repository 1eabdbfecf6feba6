"""Results as values and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from api_calls import quantize
from timm.models.vision_transformer import VisionTransformer

from dfq.results import values
from dfq.results.values import (
    AgreementOn,
    Bytes,
    CalibrationSource,
    EvaluateResult,
    FloatQuantized,
    InvertResult,
    QuantizeResult,
    Seconds,
    to_json,
)

RESULTS = [
    QuantizeResult,
    InvertResult,
    EvaluateResult,
    CalibrationSource,
    Seconds,
    Bytes,
    FloatQuantized,
    AgreementOn,
]


def test_shares_are_those_that_cannot_exceed_one() -> None:
    classes = [kind for kind in vars(values).values() if dataclasses.is_dataclass(kind)]
    fields = [field for kind in classes for field in dataclasses.fields(kind)]
    shares = {field.name for field in fields if "Share" in str(field.type)}
    assert shares <= {"float", "quantized", "teacher", "student", "agreement", "interval"}
    assert "quantized" in shares


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_frozen(kind: type[Any]) -> None:
    result = kind(*[None for _ in dataclasses.fields(kind)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, dataclasses.fields(kind)[0].name, 1)


def fields_of(kind: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def test_json_has_the_fields_of_the_results(
    tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    fields = to_json(quantize(tiny, tmp_path / "out", eval=labeled_npz))
    assert list(fields) == fields_of(QuantizeResult)
    assert list(fields["calibration"]) == fields_of(CalibrationSource)
    assert list(fields["seconds"]) == fields_of(Seconds)
    assert list(fields["bytes"]) == fields_of(Bytes)
    assert list(fields["accuracy"]) == fields_of(FloatQuantized)
    assert list(fields["agreement_on"]) == fields_of(AgreementOn)


def test_results_are_json(tmp_path: Path, tiny: VisionTransformer) -> None:
    fields = to_json(quantize(tiny, tmp_path / "out"))
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields


def test_the_report_in_the_checkpoint_is_the_result(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = to_json(quantize(tiny, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {k: v for k, v in report.items() if k != "seconds"} == {
        k: v for k, v in result.items() if k != "seconds"
    }


def test_stages_add_up_to_no_more_than_the_total(tmp_path: Path, tiny: VisionTransformer) -> None:
    seconds = quantize(tiny, tmp_path / "out").seconds
    stages = [seconds.load, seconds.invert, seconds.calibrate, seconds.quantize, seconds.evaluate]
    assert min(stages) > 0
    assert sum(stages) <= seconds.total
