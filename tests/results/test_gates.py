"""Bounds that results must keep, and reasons to distrust results: rules, messages, places."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.errors import GateError, SettingError
from dfq.pipeline.calibration_set import compare_outside
from dfq.pipeline.evaluate import agreement_on
from dfq.progress import Silent
from dfq.quantization import QuantizedViT
from dfq.results.gates import (
    check_bounds,
    check_bounds_decidable,
    check_shares,
    decides,
    doubts,
    gate,
)
from dfq.results.intervals import share_interval
from dfq.results.values import (
    AgreementOn,
    EvaluateResult,
    FloatQuantized,
    GateCheck,
    QuantizeResult,
    to_json,
)

FAST: dict[str, Any] = {"iterations": 2, "stages": 2, "threads": 1}


def agreement(count: int, total: int, data: str = "val", **changes: Any) -> AgreementOn:
    """Return the agreement of ``count`` of ``total`` images."""
    fields: dict[str, Any] = {
        "data": data,
        "images": total,
        "metric": "top1",
        "kl": 0.1,
        "agreement": count / total,
        "agreeing": count,
        "interval": list(share_interval(count, total)),
        "threshold": None,
        "error_over_spread": 0.1,
        "not_finite": 0,
    }
    return AgreementOn(**{**fields, **changes})


def unmeasured(total: int = 16) -> AgreementOn:
    return agreement(0, total, agreement=None, agreeing=None, interval=None)


def accuracy(count: int, total: int) -> FloatQuantized:
    interval = list(share_interval(count, total))
    return FloatQuantized(None, count / total, count, total, interval)


# ---- which bounds there can be


@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan"), float("inf"), 90])
def test_a_bound_is_a_share(value: float) -> None:
    with pytest.raises(SettingError, match=r"min_agreement is .*a share from 0 to 1"):
        check_shares(min_agreement=value)
    check_shares(min_agreement=0, min_accuracy=1.0, other=None)


@given(bound=st.floats(0, 1), images=st.integers(1, 500))
def test_a_bound_is_decided_by_images_that_could_keep_it(bound: float, images: int) -> None:
    assert decides(bound, images) == (share_interval(images, images)[0] >= bound)


def test_a_bound_that_the_images_cannot_decide_is_refused_with_how_many_can() -> None:
    with pytest.raises(SettingError) as caught:
        check_bounds_decidable("top1", 0.9, None, 35, "eval")
    assert str(caught.value) == (
        "min_agreement is 0.9, which 35 images cannot decide: even if all of them count, the 95 % "
        "interval begins at 0.900. It takes at least 36 images: give more data (eval), or a "
        "lower bound."
    )
    check_bounds_decidable("top1", 0.9, None, 36, "eval")
    with pytest.raises(SettingError, match=r"min_accuracy is 0\.98, which 182 images cannot"):
        check_bounds_decidable("top1", None, 0.98, 182, "data")
    check_bounds_decidable("top1", None, 0.98, 183, "data")


def test_a_bound_of_1_is_refused_whatever_the_images() -> None:
    with pytest.raises(SettingError, match=r"min_agreement is 1, which no number of images"):
        check_bounds_decidable("threshold", 1.0, None, 10**9, "eval")


def test_a_bound_of_a_mean_is_not_refused() -> None:
    check_bounds_decidable("cosine", 0.999, None, 2, "eval")


# ---- verdicts


@given(total=st.integers(1, 200), data=st.data(), bound=st.floats(0, 1))
def test_a_bound_is_kept_where_the_interval_does_not_begin_below_it(
    total: int, data: st.DataObject, bound: float
) -> None:
    count = data.draw(st.integers(0, total))
    (check,) = check_bounds(agreement(count, total), None, bound, None)
    assert (check.what, check.value, check.bound) == ("agreement", count / total, bound)
    assert check.interval == list(share_interval(count, total))
    assert check.passed == (share_interval(count, total)[0] >= bound)


def test_an_interval_that_begins_at_the_bound_keeps_it() -> None:
    low, _ = share_interval(30, 40)
    assert check_bounds(None, accuracy(30, 40), None, low)[0].passed
    assert not check_bounds(None, accuracy(30, 40), None, np.nextafter(low, 1).item())[0].passed


def test_only_bounds_that_were_set_are_checked() -> None:
    measured = agreement(9, 10), accuracy(9, 10)
    assert check_bounds(*measured, None, None) == []
    assert [c.what for c in check_bounds(*measured, 0.1, 0.2)] == ["agreement", "accuracy"]


@pytest.mark.parametrize("measured", [None, unmeasured()], ids=["nothing", "no agreement"])
def test_what_was_not_measured_keeps_no_bound(measured: AgreementOn | None) -> None:
    (check,) = check_bounds(measured, None, 0.0, None)
    assert (check.value, check.interval, check.passed) == (None, None, False)


def result(*checks: GateCheck) -> Any:
    return types.SimpleNamespace(gate=checks)


def test_a_missed_bound_is_explained_by_its_interval() -> None:
    kept = check_bounds(agreement(40, 40), None, 0.9, None)
    missed = check_bounds(agreement(19, 20), accuracy(10, 20), 0.8, 0.7)
    gate(result(*kept))
    with pytest.raises(GateError) as caught:
        gate(result(*kept, *missed))
    assert str(caught.value) == (
        "Agreement with the float model is 0.9500 with a 95 % interval of 0.7513 to 0.9987, whose "
        "lower end is below the bound of 0.8. Top-1 accuracy is 0.5000 with a 95 % interval of "
        "0.2720 to 0.7280, whose lower end is below the bound of 0.7."
    )
    with pytest.raises(GateError, match="could not be measured, so that it does not keep"):
        gate(result(*check_bounds(unmeasured(), None, 0.0, None)))


# ---- reasons to distrust


def test_what_agrees_gives_no_reason() -> None:
    assert doubts(None) == []
    assert doubts(agreement(16, 16, "inverted"), agreement(31, 32, "fractal noise")) == []
    assert doubts(agreement(1990, 2000)) == []


def test_cosines_close_to_each_other_do_not_contradict() -> None:
    inverted, noise = (
        dataclasses.replace(
            agreement(8, 8, data), metric="cosine", agreement=mean, interval=[mean, mean]
        )
        for data, mean in (("inverted", 0.9982), ("fractal noise", 0.9996))
    )
    assert doubts(inverted, noise) == []


def test_intervals_that_do_not_meet_contradict_each_other() -> None:
    (text,) = doubts(agreement(16, 16, "inverted"), agreement(24, 32, "fractal noise"))[-1:]
    assert share_interval(16, 16)[0] < share_interval(24, 32)[1]
    assert "further apart" not in text
    warnings = doubts(agreement(64, 64, "inverted"), agreement(24, 32, "fractal noise"))
    assert share_interval(64, 64)[0] > share_interval(24, 32)[1]
    assert warnings[-1] == (
        "Agreement with the float model is 1.0000 on 64 inverted images of another seed and "
        "0.7500 on 32 images of fractal noise: further apart than chance explains. Measure it on "
        "real images (eval)."
    )


@given(
    counts=st.tuples(st.integers(0, 16), st.integers(0, 32)),
)
def test_a_contradiction_is_named_where_intervals_are_apart(counts: tuple[int, int]) -> None:
    first, second = agreement(counts[0], 16, "inverted"), agreement(counts[1], 32, "fractal noise")
    low, high = share_interval(counts[0], 16)
    other_low, other_high = share_interval(counts[1], 32)
    apart = high < other_low or other_high < low
    assert any("further apart" in text for text in doubts(first, second)) == apart


@pytest.mark.parametrize("data", ["inverted", "fractal noise", "val"])
def test_an_error_as_large_as_the_outputs_differ_is_named_where_images_are_made(data: str) -> None:
    assert doubts(agreement(32, 32, data, error_over_spread=0.5)) == []
    warnings = doubts(agreement(32, 32, data, error_over_spread=1.176))
    assert [text.partition(" are off by ")[2] for text in warnings] == (
        []
        if data == "val"
        else [
            "1.2 of what the float model's differ by between images. Measure it on real images "
            "(eval)."
        ]
    )


def test_what_was_not_measured_contradicts_nothing() -> None:
    (text,) = doubts(agreement(16, 16, "inverted"), unmeasured(32))
    assert "do not differ between 32 images of val" in text


def test_outputs_that_are_not_finite_are_named() -> None:
    (text,) = doubts(agreement(1990, 2000, not_finite=3))
    assert text == "Outputs are not finite on 3 of 2000 images of val; they do not agree there."


# ---- end to end


def quantize(model: VisionTransformer, out: Path, **changes: Any) -> QuantizeResult:
    args: dict[str, Any] = {"images": 4, "settings": {"inversion": FAST}, "out": out}
    return dfq.quantize(model, **{**args, **changes})


def npz(path: Path, count: int, **arrays: Any) -> Path:
    x = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    np.savez(path, x=x, **arrays)
    return path


def test_a_bound_that_cannot_be_decided_is_refused_before_any_work(
    tiny: VisionTransformer, tmp_path: Path
) -> None:
    data = npz(tmp_path / "a.npz", 35, y=np.zeros(35, int))
    for bound in ("min_agreement", "min_accuracy"):
        with pytest.raises(SettingError, match=f"{bound} is 0.9, which 35 images.*eval"):
            quantize(tiny, tmp_path / "out", eval=data, cache=tmp_path / "cache", **{bound: 0.9})
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    quantize(tiny, tmp_path / "out")
    for bound in ("min_agreement", "min_accuracy"):
        bounds: dict[str, Any] = {bound: 0.9}
        with pytest.raises(SettingError, match=f"{bound} is 0.9, which 35 images.*data"):
            dfq.evaluate(tmp_path / "out", data=data, float_model=tiny, **bounds)


def test_without_data_as_many_images_are_made_as_a_bound_needs(
    tiny: VisionTransformer, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"min_agreement is 0\.9.*images=36"):
        quantize(tiny, tmp_path / "out", images=35, min_agreement=0.9)
    with pytest.raises(GateError) as caught:
        quantize(tiny, tmp_path / "out", images=36, bits=4, min_agreement=0.9)
    agreed = caught.value.result.agreement_on
    assert (agreed.images, agreed.data) == (36, "inverted")
    ungated = quantize(tiny, tmp_path / "out", images=36).agreement_on
    assert ungated is not None
    assert ungated.images == 8


@pytest.fixture
def hopeless(tmp_path: Path) -> Path:
    """40 images with labels that the tiny model finds the least likely."""
    path = npz(tmp_path / "wrong.npz", 40)
    loaded = dfq.load_model(make_vit())
    mean, std = (torch.tensor(v)[:, None, None] for v in (
        loaded.preprocessing.mean, loaded.preprocessing.std
    ))  # fmt: skip
    pixels = torch.from_numpy(np.load(path)["x"]).permute(0, 3, 1, 2) / 255
    worst = loaded.vit((pixels - mean) / std).argmin(-1)
    return npz(path, 40, y=worst.numpy())


FAILED = {
    "what": "accuracy",
    "value": 0.0,
    "interval": list(share_interval(0, 40)),
    "bound": 0.5,
    "passed": False,
}


def fail(model: VisionTransformer, out: Path, data: Path) -> GateError:
    with pytest.raises(GateError) as caught:
        quantize(model, out, eval=data, min_accuracy=0.5, min_agreement=0.01)
    return caught.value


def test_verdicts_are_in_the_result_and_in_the_checkpoint(
    tiny: VisionTransformer, hopeless: Path, tmp_path: Path
) -> None:
    fields = to_json(fail(tiny, tmp_path / "out", hopeless).result)
    agreed, failed = fields["gate"]
    assert failed == FAILED
    assert (agreed["what"], agreed["bound"], agreed["passed"]) == ("agreement", 0.01, True)
    assert agreed["interval"] == fields["agreement_on"]["interval"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gate"] == fields["gate"]
    assert dfq.inspect(tmp_path / "out")["report"]["gate"] == fields["gate"]
    assert isinstance(dfq.load(tmp_path / "out"), QuantizedViT)


def test_a_checkpoint_without_bounds_has_no_verdict(
    tiny: VisionTransformer, hopeless: Path, tmp_path: Path
) -> None:
    fail(tiny, tmp_path / "out", hopeless)
    assert quantize(tiny, tmp_path / "out").gate == []
    assert dfq.inspect(tmp_path / "out")["report"]["gate"] == []


def test_verdicts_of_evaluate_are_in_its_result(
    tiny: VisionTransformer, hopeless: Path, tmp_path: Path
) -> None:
    quantize(tiny, tmp_path / "out")
    with pytest.raises(GateError) as caught:
        dfq.evaluate(tmp_path / "out", data=hopeless, min_accuracy=0.5)
    assert isinstance(caught.value.result, EvaluateResult)
    assert to_json(caught.value.result)["gate"] == [FAILED]
    assert dfq.inspect(tmp_path / "out")["report"]["gate"] == []


Command = Callable[..., Any]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*words: object) -> Any:
        texts = [str(word) for word in words]
        monkeypatch.setenv("COLUMNS", "200")
        return CliRunner().invoke(app, texts)

    return run


def test_commands_show_verdicts_and_exit_with_1(
    command: Command, small_weights: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    model = ("--weights", small_weights, "--img-size", 32)
    ended = command(
        "quantize", "test_vit", *model, "--images", 4, "--iterations", 2, "--stages", 2,
        "--threads", 1, "--out", tmp_path / "out", "--eval", tmp_path / "a.npz",
        "--min-agreement", 0.01, "--json", "--bits", 8,
    )  # fmt: skip
    assert ended.exit_code == 0
    count = json.loads(ended.stdout)["agreement_on"]["agreeing"]
    assert 0 < count < 40  # so that a bound of 0.9 is missed
    shown = command("inspect", tmp_path / "out").stdout
    assert "agreement of at least 0.01: kept" in shown
    low, high = share_interval(count, 40)
    assert f"{count / 40:.2%} on 40 images of" in shown
    assert f"({count} of 40; 95 %: {low:.2%} to {high:.2%})" in " ".join(shown.split())
    arguments = ("evaluate", tmp_path / "out", "--data", tmp_path / "a.npz", "--float", "test_vit")
    for flags in ((), ("--json",)):
        ended = command(*arguments, *model, "--min-agreement", 0.9, *flags)
        assert ended.exit_code == 1
        assert "whose lower end is below the bound of" in ended.stderr
        if not flags:
            assert "agreement of at least 0.9: not kept" in ended.stdout
    (verdict,) = json.loads(ended.stdout)["gate"]
    assert verdict == {
        "what": "agreement", "value": count / 40, "interval": [low, high], "bound": 0.9,
        "passed": False,
    }  # fmt: skip


def test_inspect_shows_that_a_checkpoint_failed(
    command: Command, tiny: VisionTransformer, hopeless: Path, tmp_path: Path
) -> None:
    fail(tiny, tmp_path / "out", hopeless)
    shown = " ".join(command("inspect", tmp_path / "out").stdout.split())
    assert "accuracy of at least 0.5: not kept" in shown
    assert "agreement of at least 0.01: kept" in shown
    printed = json.loads(command("inspect", tmp_path / "out", "--json").stdout)
    assert printed["report"]["gate"][1] == FAILED


# ---- agreement outside


def test_a_model_that_follows_only_on_inverted_images_is_distrusted(
    tiny: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inverted images have half of the patches, fractal noise has all of them."""
    honest = QuantizedViT.forward_sparse

    def rigged(self: QuantizedViT, patches: Tensor, positions: Tensor) -> Tensor:
        logits = honest(self, patches, positions)
        return -logits if positions.shape[1] == self.arch.grid.patches else logits

    settings = {"inversion": {**FAST, "unit_size": 32}}
    fair = quantize(tiny, tmp_path / "fair", settings=settings)
    assert fair.agreement_outside is not None
    assert (fair.agreement_outside.data, fair.agreement_outside.images) == ("fractal noise", 32)
    assert fair.agreement_outside.agreement is not None
    assert fair.agreement_outside.agreement > 0.9
    assert fair.warnings == []
    monkeypatch.setattr(QuantizedViT, "forward_sparse", rigged)
    quantized = quantize(tiny, tmp_path / "out", settings=settings)
    assert quantized.agreement == fair.agreement
    assert quantized.agreement_outside is not None
    assert quantized.agreement_outside.agreement is not None
    assert quantized.agreement_outside.agreement < 0.1
    poor, far, apart = quantized.warnings
    assert "on 32 images of fractal noise, with a 95 % interval of" in poor
    assert far.startswith("On 32 images of fractal noise the outputs are off by ")
    assert "on 64 inverted images of another seed and" in apart
    assert "further apart than chance explains" in apart
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["warnings"] == quantized.warnings
    assert report["agreement_outside"]["agreement"] == quantized.agreement_outside.agreement


def test_ranges_that_cut_activations_off_are_distrusted(
    tiny: VisionTransformer, tmp_path: Path
) -> None:
    quantize(tiny, tmp_path / "out")
    loaded = dfq.load_model(tiny)

    def outside(model: QuantizedViT) -> list[str]:
        return doubts(agreement_on(compare_outside(loaded, model, Silent()), "fractal noise"))

    assert outside(dfq.load(tmp_path / "out", runtime="torch")) == []
    cut = dfq.load(tmp_path / "out", runtime="torch")
    state = cut.state_dict()
    for name, value in state.items():
        if name.startswith("blocks.") and name.endswith("input_scale"):
            state[name] = value * 0.25
    cut.load_state_dict(state)
    assert any("outputs are off by" in text for text in outside(cut))


def test_there_is_no_agreement_outside_beside_data(tiny: VisionTransformer, tmp_path: Path) -> None:
    quantized = quantize(tiny, tmp_path / "out", eval=npz(tmp_path / "a.npz", 8))
    assert quantized.agreement_outside is None
