"""Models that are not square, not of three channels or not pooled by a class token: every verb,
from a file of weights by timm's name, beside timm's own model in floating point."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from exported_models import onnx_session
from families import spread_out
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.errors import SettingError, WeightsError

NAME = "test_vit"
"""timm's own test model: 64 wide, 6 blocks, patches of 16 pixels."""


@dataclass(frozen=True)
class Case:
    """``made`` are timm's keywords, ``named`` what a user has to say, ``size`` of the input."""

    made: dict[str, Any]
    named: dict[str, Any]
    channels: int = 3
    size: tuple[int, int] = (32, 32)


CASES = {
    "not square": Case({"img_size": (32, 64)}, {"img_size": [32, 64]}, size=(32, 64)),
    "one channel": Case({"in_chans": 1}, {"img_size": 32}, channels=1),
    "four channels": Case({"in_chans": 4}, {"img_size": 32, "in_chans": 4}, channels=4),
    "mean of patches": Case({"global_pool": "avg"}, {"img_size": 32}),
    "mean after the norm": Case(
        {"global_pool": "avg", "fc_norm": False}, {"img_size": 32, "global_pool": "avg"}
    ),
}

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def timm_model(**changes: Any) -> nn.Module:
    """A model whose logits differ between images."""
    sizes = {"img_size": 32, "num_classes": 5, **changes}
    return spread_out(partial(timm.create_model, NAME, **sizes))


@dataclass(frozen=True)
class Files:
    model: nn.Module
    weights: Path
    data: Path
    pixels: np.ndarray
    options: dict[str, Any]

    def inputs(self) -> torch.Tensor:
        """The images ``[N, C, H, W]`` as the model sees them: mean and spread are 0.5."""
        pixels = torch.from_numpy(self.pixels).float() / 255
        return (pixels.permute(0, 3, 1, 2) - 0.5) / 0.5


@pytest.fixture
def files(case: Case, tmp_path: Path) -> Files:
    model, shape = timm_model(**case.made), (24, *case.size, case.channels)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels)
    options = {
        "weights": tmp_path / "weights.safetensors",
        "mean": [0.5] * case.channels,
        "std": [0.5] * case.channels,
        **case.named,
    }
    return Files(model, options["weights"], tmp_path / "images.npz", pixels, options)


FAST = {"inversion": {"iterations": 4, "precision": "float32", "threads": 1, "unit_size": 2}}


@cases
def test_a_file_becomes_timms_own_model(files: Files) -> None:
    loaded = dfq.load_model(NAME, **files.options)
    with torch.inference_mode():
        expected, actual = files.model(files.inputs()), loaded.vit(files.inputs())
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@cases
def test_every_verb_works(case: Case, files: Files, tmp_path: Path) -> None:
    made = dfq.invert(NAME, images=4, settings=FAST["inversion"], **files.options)
    assert dfq.inspect(made.path)["images"] == 4
    result = dfq.quantize(
        NAME,
        images=4,
        bits=8,
        out=tmp_path / "out",
        eval=files.data,
        settings=FAST,
        **files.options,
    )
    assert result.calibration.cached
    assert result.calibration.path == made.path
    model = dfq.load(result.checkpoint)
    with torch.inference_mode():
        expected, actual = files.model(files.inputs()), model(files.inputs())
    assert float((actual - expected).norm() / expected.norm()) < 0.1
    assert (model.arch.image_size, model.arch.in_channels) == (case.size, case.channels)

    evaluated = dfq.evaluate(
        result.checkpoint, data=files.data, float_model=NAME, weights=files.weights
    )
    same = expected.argmax(1) == actual.argmax(1)
    assert evaluated.agreement == pytest.approx(float(same.float().mean()))
    assert evaluated.agreement == result.agreement

    path = dfq.export(result.checkpoint, out=tmp_path / "model.onnx").path
    session = onnx_session(Path(path))
    given = {session.get_inputs()[0].name: files.inputs().numpy()}
    (exported,) = session.run(None, given)
    difference = np.linalg.norm(exported - expected.numpy()) / expected.norm()
    assert float(difference) < 0.1


@cases
def test_the_command_line_takes_the_same_flags(files: Files, tmp_path: Path) -> None:
    flags = []
    for option, value in files.options.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags += [f"--{option.replace('_', '-')}", text]
    out = tmp_path / "images"
    command = ["invert", NAME, "--method", "noise", "--images", "4", "--out", str(out), "--json"]
    ended = CliRunner().invoke(app, [*command, *flags])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["images"] == 4
    architecture = json.loads((out / "settings.json").read_text())["model"]["architecture"]
    expected = dfq.load_model(NAME, **files.options).vit.arch
    assert architecture["image_size"] == list(expected.image_size)
    assert architecture["in_channels"] == expected.in_channels
    assert architecture["pool"] == expected.pool


def test_a_student_is_pooled_as_its_teacher(tmp_path: Path) -> None:
    model = timm_model(global_pool="avg")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    dfq.distill(
        NAME,
        depth=2,
        data="noise",
        images=4,
        steps=2,
        out=tmp_path / "student",
        weights=tmp_path / "weights.safetensors",
        img_size=32,
    )
    arch = dfq.load_model(str(tmp_path / "student")).vit.arch
    assert (arch.pool, arch.final_norm, arch.pooled_norm, arch.depth) == ("avg", False, True, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"img_size": [32, 64, 3]}, SettingError, "img_size has 3 numbers"),
        ({"img_size": [32, 0]}, SettingError, "img_size is 0; it must be at least 1"),
        ({"img_size": [32, 8]}, SettingError, r"img_size is \(32, 8\), less than a patch of 16"),
        ({"in_chans": 0}, SettingError, "in_chans is 0; it must be at least 1"),
        ({"in_chans": 4}, WeightsError, r"3 channels, not 4.*in_chans out, or set it to 3"),
        ({"global_pool": "max"}, SettingError, "global_pool is 'max'; known: token, avg, map"),
        ({"global_pool": "map"}, WeightsError, r"missing, such as 'attn_pool"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm_model().state_dict(), path)
    with pytest.raises(error, match=message):
        dfq.load_model(NAME, weights=path, **{"img_size": 32, **options})


@pytest.mark.parametrize(
    "option", [{"in_chans": 1}, {"global_pool": "avg"}, {"img_size": [32, 48]}], ids=str
)
def test_a_module_in_memory_is_what_it_is(option: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=rf"{next(iter(option))} is .*module in memory has"):
        dfq.load_model(timm_model(), **option)


def test_a_module_in_memory_may_be_told_what_it_is() -> None:
    told: dict[str, Any] = {"img_size": [32, 32], "in_chans": 3, "global_pool": "token"}
    assert dfq.load_model(timm_model(), **told).vit.arch.image_size == (32, 32)


@pytest.mark.parametrize("text", ["224x224", "a", "224,", "1.5"])
def test_a_size_that_is_no_numbers_is_said(text: str) -> None:
    ended = CliRunner().invoke(app, ["invert", NAME, "--img-size", text])
    assert ended.exit_code == 2
    assert f"--img-size is '{text}'" in ended.output


def test_the_float_models_options_need_its_name(tmp_path: Path) -> None:
    for option in ({"in_chans": 1}, {"global_pool": "avg"}):
        with pytest.raises(SettingError, match="name it too"):
            dfq.evaluate(tmp_path, data="demo", **option)
