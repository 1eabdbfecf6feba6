"""The command line: output, messages and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.data.dataset import SparseImageDataset
from dfq.data.preview import HEADING
from dfq.results.values import EvaluateResult, InvertResult, QuantizeResult

MODEL = "test_vit"
"""timm's own test model; it takes a fifth of the time of the smallest real one."""

FAST = ["--iterations", "4", "--images", "4", "--stages", "2", "--threads", "1"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class Cli:
    """Runs commands in this process, as ``dfq`` would."""

    def __init__(self, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights, self.monkeypatch = weights, monkeypatch

    @property
    def model(self) -> list[str]:
        return [MODEL, "--weights", str(self.weights), "--img-size", "32"]

    def __call__(self, *args: str | Path) -> Outcome:
        texts = [str(a) for a in args]
        self.monkeypatch.setattr(sys, "argv", ["dfq", *texts])
        result = CliRunner().invoke(app, texts)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    def quantize(self, out: Path, *args: str | Path) -> Outcome:
        return self("quantize", *self.model, *FAST, "--out", out, *args)

    def invert(self, *args: str | Path) -> Outcome:
        return self("invert", *self.model, *FAST, *args)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small model at 32 px with 5 classes, randomly initialised."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(MODEL, img_size=32, num_classes=5)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def cli(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(weights, monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W8A8 checkpoint of the small model."""
    root = tmp_path_factory.mktemp("checkpoint")
    dfq.quantize(
        MODEL,
        weights=weights,
        img_size=32,
        images=4,
        settings={"inversion": {"iterations": 4, "stages": 2, "threads": 1}},
        out=root / "w8a8",
        cache=root / "cache",
    )
    return root / "w8a8"


def listing(path: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_schema(value: Any, kind: Any) -> None:
    """``value`` has the fields of a result, in order and of their types, all the way down."""
    if isinstance(kind, types.UnionType):
        if value is None:
            assert types.NoneType in typing.get_args(kind)
            return
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is list:
        assert type(value) is list
        for item in value:
            assert_schema(item, typing.get_args(kind)[0])
        return
    if not dataclasses.is_dataclass(kind):
        assert type(value) is kind or (kind is float and type(value) is int)
        return
    hints = typing.get_type_hints(kind)
    assert list(value) == [f.name for f in dataclasses.fields(kind)]
    for name, item in value.items():
        assert_schema(item, hints[name])


# ---- arguments that name nothing, links


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["quantize", "demo", "--calibration", ""], "--calibration"),
        (["quantize", "demo", "--cache="], "--cache"),
        (["distill", "demo", "--student", ""], "--student"),
        (["evaluate", "checkpoint", "--data", "", "--json"], "--data"),
        (["inspect", ""], "An argument"),
    ],
    ids=["calibration", "cache", "student", "data", "positional"],
)
def test_an_empty_argument_is_not_the_working_directory(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli(*words)
    assert ended.code == 2
    assert f"{name} is empty; leave it out" in ended.stderr
    assert not list(tmp_path.iterdir())
    if "--json" in words:
        assert ended.json["error"]["type"] == "UsageError"


def test_what_a_link_leads_to_is_replaced(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert cli.quantize(tmp_path / "current", "--calibration", "noise", "--bits", "4").code == 0
    assert (tmp_path / "current").is_symlink()
    assert "bits = 4" in (tmp_path / "v1" / "recipe.toml").read_text()


@pytest.mark.parametrize("verb", ["quantize", "invert"])
def test_a_link_to_nothing_is_refused_before_work(cli: Cli, tmp_path: Path, verb: str) -> None:
    (tmp_path / "out").symlink_to("missing")
    ended = cli(verb, *cli.model, *FAST, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "is a link to 'missing', which does not exist" in ended.stderr
    assert "Inverting" not in ended.stderr


def test_a_head_of_another_shape_is_shown(cli: Cli, tmp_path: Path) -> None:
    state = load_file(cli.weights)
    state["head.weight"] = state["head.weight"][:, :1].contiguous()
    save_file(state, tmp_path / "odd.safetensors")
    ended = cli("quantize", MODEL, "--weights", tmp_path / "odd.safetensors", "--img-size", "32")
    assert ended.code == 2
    assert "'head.weight': [5, 1] in the file, [5, 64] in the model" in ended.stderr


def test_a_preview_replaces_pictures_alone(cli: Cli, tmp_path: Path) -> None:
    assert cli.invert("--out", tmp_path / "images").code == 0
    (tmp_path / "mine.png").write_text("mine")
    ended = cli("inspect", tmp_path / "images", "--preview", tmp_path / "mine.png")
    assert ended.code == 2
    assert "is no PNG file. It was not touched" in ended.stderr
    assert (tmp_path / "mine.png").read_text() == "mine"
    for _ in range(2):
        assert cli("inspect", tmp_path / "images", "--preview", tmp_path / "a.png").code == 0


def test_a_cache_that_is_a_file_is_no_empty_cache(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    ended = cli("cache", "list", "--cache", tmp_path / "cache")
    assert ended.code == 2
    assert "is a file, not a directory" in ended.stderr


# ---- quantize


def test_json_of_quantize_is_the_result_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--json")
    assert ended.code == 0
    assert_schema(ended.json, QuantizeResult)


def test_json_of_quantize_with_data_has_accuracies(
    cli: Cli, tmp_path: Path, labelled_npz: Path
) -> None:
    found = cli.quantize(tmp_path / "out", "--eval", labelled_npz, "--json").json
    assert_schema(found, QuantizeResult)
    assert found["accuracy"]["images"] == 20
    assert found["accuracy"]["correct"] == round(20 * found["accuracy"]["quantized"])
    assert found["agreement_on"]["images"] == 20


def test_flags_reach_the_result(cli: Cli, tmp_path: Path) -> None:
    args = ["--bits", "4", "--attention", "int8", "--calibration", "smi", "--images", "3"]
    found = cli.quantize(tmp_path / "out", *args, "--json").json
    assert (found["scheme"], found["attention"]) == ("w4a8", "int8")
    assert (found["calibration"]["method"], found["calibration"]["images"]) == ("smi", 3)


def test_progress_goes_to_stderr(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--json")
    assert "Inverting images (pri): 4/4" in ended.stderr
    assert "Inverting" not in ended.stdout


def test_quiet_prints_nothing(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--quiet")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")


def test_quiet_json_prints_the_result_alone(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--quiet", "--json")
    assert_schema(ended.json, QuantizeResult)
    assert ended.stderr == ""


def test_the_table_says_what_people_ask(cli: Cli, tmp_path: Path, labelled_npz: Path) -> None:
    shown = cli.quantize(tmp_path / "out", "--eval", labelled_npz).stdout
    for part in (MODEL, "w8a8", "4 images, pri, made now", "times smaller", "top-1", "agreement"):
        assert part in shown


def test_the_second_quantization_says_that_it_used_the_cache(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "first")
    ended = cli.quantize(tmp_path / "second")
    assert "Found 4 images in" in ended.stderr
    assert "from the cache" in ended.stdout


def test_the_second_quantization_is_cached_and_the_same(cli: Cli, tmp_path: Path) -> None:
    first = cli.quantize(tmp_path / "first", "--json").json["calibration"]
    second = cli.quantize(tmp_path / "second", "--json").json["calibration"]
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["path"] == second["path"]
    one, two = (tmp_path / d / "model.safetensors" for d in ("first", "second"))
    assert one.read_bytes() == two.read_bytes()


def test_other_bits_share_the_cached_images(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "eight", "--bits", "8")
    assert cli.quantize(tmp_path / "four", "--bits", "4", "--json").json["calibration"]["cached"]


def test_another_seed_makes_other_images(cli: Cli, tmp_path: Path) -> None:
    first = cli.quantize(tmp_path / "a", "--seed", "0", "--json").json["calibration"]
    second = cli.quantize(tmp_path / "b", "--seed", "1", "--json").json["calibration"]
    assert not second["cached"]
    assert first["path"] != second["path"]


def test_the_cache_can_be_named(cli: Cli, tmp_path: Path) -> None:
    found = cli.quantize(tmp_path / "out", "--cache", tmp_path / "cache", "--json").json
    assert Path(found["calibration"]["path"]).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("args", [["--bits", "4"], ["--attention", "int8"]], ids=str)
def test_the_recipe_of_a_checkpoint_makes_the_same_checkpoint(
    args: list[str], cli: Cli, tmp_path: Path
) -> None:
    cli.quantize(tmp_path / "first", *args)
    recipe = tmp_path / "first" / "recipe.toml"
    ended = cli(
        "quantize", *cli.model, "--recipe", recipe, "--out", tmp_path / "second",
        "--cache", tmp_path / "cache", "--json",
    )  # fmt: skip
    assert not ended.json["calibration"]["cached"]
    one, two = (tmp_path / d / "model.safetensors" for d in ("first", "second"))
    assert one.read_bytes() == two.read_bytes()


def test_flags_win_over_the_recipe(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[quantization]\nbits = 4\n[inversion]\nimages = 9\n")
    found = cli.quantize(tmp_path / "out", "--recipe", tmp_path / "r.toml", "--json").json
    assert (found["scheme"], found["calibration"]["images"]) == ("w4a8", 4)


def test_the_output_is_named_after_model_and_scheme(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("quantize", *cli.model, *FAST, "--bits", "4", "-q").code == 0
    assert (tmp_path / f"{MODEL}-w4a8" / "config.json").is_file()


def test_an_older_checkpoint_is_replaced(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "out", "--bits", "8")
    assert cli.quantize(tmp_path / "out", "--bits", "4").code == 0
    assert dfq.load(tmp_path / "out").settings.bits == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_gate_that_fails_exits_with_1_and_prints_the_result(
    cli: Cli, tmp_path: Path, labelled_npz: Path
) -> None:
    ended = cli.quantize(
        tmp_path / "out", "--eval", labelled_npz, "--min-accuracy", "0.8", "--json"
    )
    assert ended.code == 1
    assert_schema(ended.json, QuantizeResult)
    assert "below the bound of 0.8" in ended.stderr


def test_a_gate_that_fails_shows_the_table(cli: Cli, tmp_path: Path, labelled_npz: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--eval", labelled_npz, "--min-accuracy", "0.8")
    assert ended.code == 1
    assert "top-1" in ended.stdout


def test_a_gate_that_holds_exits_with_0(cli: Cli, tmp_path: Path) -> None:
    assert cli.quantize(tmp_path / "out", "--min-agreement", "0").code == 0


def test_images_of_ones_own_calibrate(cli: Cli, tmp_path: Path, labelled_npz: Path) -> None:
    found = cli.quantize(tmp_path / "out", "--calibration", labelled_npz, "--json").json
    assert found["calibration"] == {
        "method": "images",
        "images": 4,
        "path": str(labelled_npz),
        "cached": None,
    }


def test_an_inverted_dataset_calibrates(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images", "--method", "dmi")
    found = cli.quantize(tmp_path / "out", "--calibration", tmp_path / "images", "--json").json
    assert (found["calibration"]["method"], found["calibration"]["images"]) == ("dmi", 4)


def test_a_dataset_of_another_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    state = load_file(cli.weights)
    state["head.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    ended = cli.quantize(
        tmp_path / "out",
        *("--calibration", tmp_path / "images", "--weights", tmp_path / "other.safetensors"),
    )
    assert ended.code == 2
    assert "made from another model" in ended.stderr
    assert not (tmp_path / "out").exists()


# ---- the other commands


def test_json_of_invert_is_the_result_and_nothing_else(cli: Cli) -> None:
    ended = cli.invert("--json")
    assert ended.code == 0
    assert_schema(ended.json, InvertResult)


@pytest.mark.parametrize("method", ["pri", "smi", "dmi", "noise"])
def test_every_method_inverts(method: str, cli: Cli, tmp_path: Path) -> None:
    assert cli.invert("--method", method, "--out", tmp_path / "images").code == 0
    assert len(SparseImageDataset(tmp_path / "images")) == 4


def test_the_second_inversion_into_a_directory_finds_the_first(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    assert cli.invert("--out", tmp_path / "images", "--json").json["cached"]


def test_json_of_evaluate_is_the_result_and_nothing_else(
    cli: Cli, checkpoint: Path, labelled_npz: Path
) -> None:
    ended = cli("evaluate", checkpoint, "--data", labelled_npz, "--json")
    assert ended.code == 0
    assert_schema(ended.json, EvaluateResult)
    assert ended.json["agreement"] is None


def test_evaluation_beside_the_float_model_has_agreement(
    cli: Cli, checkpoint: Path, labelled_npz: Path
) -> None:
    args = ["--float", MODEL, "--weights", cli.weights, "--data", labelled_npz]
    found = cli("evaluate", checkpoint, *args, "--json").json
    assert_schema(found, EvaluateResult)
    assert 0 <= found["agreement"] <= 1


def test_a_gate_of_evaluate_exits_with_1_and_prints_the_result(
    cli: Cli, checkpoint: Path, labelled_npz: Path
) -> None:
    ended = cli("evaluate", checkpoint, "--data", labelled_npz, "--min-accuracy", "0.8", "--json")
    assert ended.code == 1
    assert_schema(ended.json, EvaluateResult)


def test_inspect_says_what_a_checkpoint_is(cli: Cli, checkpoint: Path) -> None:
    found = cli("inspect", checkpoint, "--json").json
    assert (found["kind"], found["model"], found["scheme"]) == ("checkpoint", MODEL, "w8a8")


def test_inspect_draws_a_dataset(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    ended = cli("inspect", tmp_path / "images", "--preview", tmp_path / "sheet.png")
    assert ended.code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 128 + 6, 2 * 128 + 6 + HEADING)


def test_inspect_shows_a_table(cli: Cli, checkpoint: Path) -> None:
    ended = cli("inspect", checkpoint)
    assert ended.code == 0
    assert "checkpoint" in ended.stdout


def test_inspect_shows_the_noise_of_every_layer(cli: Cli, checkpoint: Path) -> None:
    shown = cli("inspect", checkpoint, "--layers").stdout
    assert "patch_embed" in shown
    assert "blocks.0.attn.qkv" in shown
    layers = cli("inspect", checkpoint, "--layers", "--json").json["layers"]
    assert layers[-1]["name"] == "head"
    assert all(row["both"] > 10 for row in layers)


@pytest.mark.parametrize(
    "report",
    ["[]", "{", '{"layers": 3}', '{"layers": [{"name": 1}]}', '{"layers": [["a"]]}', "null"],
)
def test_a_report_without_layers_is_refused(
    cli: Cli, checkpoint: Path, tmp_path: Path, report: str
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(checkpoint, copied)
    (copied / "report.json").write_text(report)
    ended = cli("inspect", copied, "--layers")
    assert ended.code == 2
    assert "no measured layers" in ended.stderr


def test_inspect_does_not_draw_checkpoints(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    ended = cli("inspect", checkpoint, "--preview", tmp_path / "sheet.png")
    assert ended.code == 2
    assert "not a sparse-image dataset" in ended.stderr


def test_models_are_listed(cli: Cli) -> None:
    shown = cli("models").stdout
    assert all(f"{name}  " in shown for name in ("demo", "vit_base", "deit_tiny_patch16_224"))


def test_models_are_filtered(cli: Cli) -> None:
    found = cli("models", "deit_tiny", "--json").json
    assert found
    assert all("deit_tiny" in entry["name"] for entry in found)


def test_the_doctor_says_what_this_machine_offers(cli: Cli) -> None:
    found = cli("doctor", "--json").json
    assert_schema(
        {k: v for k, v in found.items() if k in ("processor", "threads", "backend")},
        dataclasses.make_dataclass(
            "Part", [("processor", str), ("threads", int), ("backend", str)]
        ),
    )
    assert found["versions"]["dfq"] == dfq.__version__


def test_the_doctor_fails_where_something_is_wrong(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = cli("doctor", "--json", "--cache", tmp_path / "file")
    assert result.code == 1
    assert any("cannot be written" in p for p in result.json["problems"])


def test_an_empty_cache_is_said_to_be_empty(cli: Cli) -> None:
    assert cli("cache", "list").stdout == "The cache holds no datasets.\n"


def test_the_cache_lists_its_datasets(cli: Cli) -> None:
    path = cli.invert("--json").json["path"]
    (entry,) = cli("cache", "list", "--json").json
    assert (entry["path"], entry["method"], entry["images"]) == (path, "pri", 4)
    assert entry["problem"] is None


def test_a_whole_cache_verifies(cli: Cli) -> None:
    cli.invert()
    assert cli("cache", "verify").code == 0


def test_a_damaged_cache_exits_with_1(cli: Cli) -> None:
    path = Path(cli.invert("--json").json["path"])
    shard = next(path.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    ended = cli("cache", "verify", "--json")
    assert ended.code == 1
    assert "is damaged" in ended.json[0]["problem"]


@pytest.mark.parametrize("name", ["all", MODEL], ids=["all", "start of the name"])
def test_cached_datasets_are_removed(name: str, cli: Cli) -> None:
    path = Path(cli.invert("--json").json["path"])
    assert cli("cache", "remove", name).code == 0
    assert not path.exists()


# ---- mistakes


@dataclass(frozen=True)
class Places:
    """What the arguments of a wrong command may name."""

    cli: Cli
    tmp: Path
    npz: Path
    checkpoint: Path

    def file(self, name: str, text: str = "") -> Path:
        path = self.tmp / name
        path.write_text(text)
        return path

    def folder(self, *names: str) -> Path:
        for name in names or (".",):
            (self.tmp / "data" / name).mkdir(parents=True)
        return self.tmp / "data"


@pytest.fixture
def places(cli: Cli, tmp_path: Path, labelled_npz: Path, checkpoint: Path) -> Places:
    return Places(cli, tmp_path, labelled_npz, checkpoint)


Args = list[str | Path]


def quantize_with(*args: str) -> Callable[[Places], Args]:
    return lambda p: ["quantize", *p.cli.model, *FAST, "--out", p.tmp / "out", *args]


def quantize_at(name: str, place: Callable[[Places], str | Path]) -> Callable[[Places], Args]:
    return lambda p: [*quantize_with()(p), name, place(p)]


def recipe_of(text: str) -> Callable[[Places], Args]:
    return quantize_at("--recipe", lambda p: p.file("r.toml", text))


def invert_with(*args: str) -> Callable[[Places], Args]:
    return lambda p: ["invert", *p.cli.model, *FAST, *args]


def evaluate_with(*args: str) -> Callable[[Places], Args]:
    return lambda p: ["evaluate", p.checkpoint, "--data", p.npz, *args]


MISTAKES: dict[str, tuple[Callable[[Places], Args], str, str]] = {
    # what is called, what arrived, what is allowed
    "bits": (quantize_with("--bits", "9"), "bits is 9", "2 to 8"),
    "no images": (quantize_with("--images", "0"), "images is 0", "from 1 to"),
    "fewer than no images": (quantize_with("--images", "-1"), "images is -1", "from 1 to"),
    "no iterations": (quantize_with("--iterations", "0"), "iterations is 0", "from 1 to"),
    "more stages than patches": (quantize_with("--stages", "5", "--iterations", "9"),
                                 "stages is 5", "4 patches"),
    "more stages than iterations": (quantize_with("--stages", "4", "--iterations", "3"),
                                    "stages is 4", "3 iterations"),
    "no stages": (invert_with("--stages", "0"), "stages is 0", "from 1 to"),
    "seed": (quantize_with("--seed", "-1"), "seed is -1", "from 0 to 2147483647"),
    "threads": (quantize_with("--threads", "0"), "threads is 0", "from 1 to"),
    "attention": (quantize_with("--attention", "int4"), "attention is 'int4'", "float, int8"),
    "calibration": (quantize_with("--calibration", "pry"), "'pry'", "pri, smi, dmi, noise"),
    "method": (invert_with("--method", "prr"), "method is 'prr'", "pri, smi, dmi, noise"),
    "typo in a method": (invert_with("--method", "nois"), "'nois'", "Did you mean 'noise'"),
    "device": (quantize_with("--device", "tpu"), "'tpu'", "available: cpu"),
    "device that needs a plugin": (quantize_with("--device", "hpu"), "'hpu'", "available: cpu"),
    "device number": (invert_with("--device", "cuda:99"), "'cuda:99'", "available: cpu"),
    "meta device": (quantize_with("--device", "meta"), "'meta'", "available: cpu"),
    "two values of mean": (quantize_with("--mean", "0.5,0.5"), "--mean has 2", "3 channels"),
    "mean of words": (quantize_with("--mean", "half"), "--mean is 'half'", "0.5,0.5,0.5"),
    "empty std": (quantize_with("--std", ""), "--std is empty", "leave it out"),
    "std of 0": (quantize_with("--std", "0,1,1"), "0, 1, 1", "from 0.003922 to 1"),
    "mean of another range": (
        quantize_with("--mean", "123.7,116.3,103.5", "--std", "58.4,57.1,57.4"),
        "--mean", "--input-range 0,255",
    ),
    "input range of words": (
        quantize_with("--input-range", "0-255"), "--input-range is '0-255'", "0,255",
    ),
    "input range upside down": (
        quantize_with("--input-range", "1,-1"), "--input-range", "1 to -1",
    ),
    "mean that is no number": (quantize_with("--mean", "nan,0,0"), "--mean", "nan"),
    "bound": (quantize_with("--min-agreement", "90"), "min_agreement is 90", "0 to 1"),
    "bound without data": (quantize_with("--min-accuracy", "0.5"), "min_accuracy", "--eval DATA"),
    "classes": (quantize_with("--num-classes", "-1"), "--num-classes is -1", "at least 0"),
    "other classes": (quantize_with("--num-classes", "6"), "asked for 6", "--num-classes 5"),
    "image size": (quantize_with("--img-size", "-5"), "--img-size is -5", "at least 1"),
    "missing recipe": (quantize_at("--recipe", lambda p: p.tmp / "none.toml"),
                       "none.toml'", "does not exist"),
    "recipe that is a directory": (quantize_at("--recipe", lambda p: p.tmp),
                                   "cannot be read", "directory"),
    "recipe that is no TOML": (recipe_of("bits: 4"), "r.toml'", "not valid TOML"),
    "typo in a recipe": (recipe_of("[inversion]\niteration = 4"),
                         "unknown key 'iteration' in [inversion]", "Did you mean 'iterations'"),
    "typo in a table": (recipe_of("[inversions]\nimages = 4"),
                        "unknown key 'inversions'", "['distillation', 'inversion',"),
    "recipe without a table": (recipe_of("bits = 4"),
                               "unknown key 'bits'", "under [quantization]"),
    "recipe out of range": (recipe_of("[quantization]\nobserver = 'mean'"),
                            "observer is 'mean'", "minmax, moving_average, histogram"),
    "recipe of another type": (recipe_of("[inversion]\nlr = 'high'"),
                               "lr is 'high'", "a number from"),
    "missing weights": (quantize_with("--weights", "none.pth"), "'none.pth'", "does not exist"),
    "weights of text": (quantize_at("--weights", lambda p: p.file("w.pth", "hello")),
                        "w.pth'", "safetensors or torch file"),
    "unknown model": (lambda p: ["quantize", "vit_bse", "--out", p.tmp / "out"],
                      "'vit_bse'", "'vit_base'"),
    "unsupported model": (lambda p: ["quantize", "resnet18", "--out", p.tmp / "out"],
                          "ResNet", "Supported"),
    "missing data": (quantize_with("--eval", "none.npz"), "'none.npz'", "give an image folder"),
    "empty data": (quantize_at("--eval", lambda p: p.folder()), "data'", "no class folders"),
    "data without images": (quantize_at("--eval", lambda p: p.folder("a", "b", "c", "d", "e")),
                            "data'", "no images in its 5 class folders"),
    "data of other classes": (quantize_at("--eval", lambda p: p.folder("a", "b")),
                              "2 class folders", "5 classes"),
    "data of the demo": (quantize_with("--eval", "demo"), "5 and 3", "10 classes and 1 channel"),
    "empty images": (quantize_at("--calibration", lambda p: p.folder()),
                     "data' holds no images", ".png"),
    "output below a file": (quantize_at("--out", lambda p: p.file("f") / "out"),
                            "f'", "not a directory"),
    "output that is a file": (quantize_at("--out", lambda p: p.file("f")),
                              "f' is a file", "takes a directory"),
    "dataset below a file": (lambda p: [*invert_with("--out")(p), p.file("f") / "out"],
                             "f/out'", "a place that can be written"),
    "dataset that is a file": (lambda p: [*invert_with("--out")(p), p.file("f")],
                               "f' is a file", "not a directory"),
    "cache that is a file": (lambda p: [*invert_with("--cache")(p), p.file("f")],
                             "Cannot write", "a place that can be written"),
    "no checkpoint": (lambda p: ["evaluate", p.folder(), "--data", p.npz],
                      "data' is not a dfq checkpoint", "dfq quantize MODEL --out DIR"),
    "missing checkpoint": (lambda p: ["evaluate", p.tmp / "none", "--data", p.npz],
                           "none' is not a dfq checkpoint", "dfq quantize MODEL --out DIR"),
    "missing data of evaluate": (evaluate_with("--data", "none.npz"),
                                 "'none.npz' does not exist", "give an image folder"),
    "backend": (evaluate_with("--backend", "cublas"), "'cublas'", "['onednn', 'reference']"),
    "agreement without a model": (evaluate_with("--min-agreement", "0.5"),
                                  "min_agreement", "--float MODEL"),
    "weights without a model": (evaluate_with("--weights", "w.pth"), "weights", "--float MODEL"),
    "inspect nothing": (lambda p: ["inspect", p.tmp / "none"], "none' does not exist",
                        "a sparse-image dataset, a dfq checkpoint or a student"),
    "inspect something else": (lambda p: ["inspect", p.folder()], "data' holds neither",
                               "nor a dfq checkpoint"),
    "inspect rows without a picture": (lambda p: ["inspect", p.checkpoint, "--rows", "3"],
                                       "--rows", "--preview"),
    "inspect preview of another kind": (
        lambda p: ["inspect", p.checkpoint, "--preview", p.tmp / "x.gif"], "x.gif", ".png"),
    "models of no name": (lambda _: ["models", "vitt_base"], "'vitt_base'", "Did you mean"),
    "export format": (lambda p: ["export", p.checkpoint, "--format", "tflite"],
                      "format is 'tflite'", "onnx, openvino, torch"),
    "export suffix": (lambda p: ["export", p.checkpoint, "--out", p.tmp / "model.pt"],
                      "model.pt'", "ends in .onnx"),
    "export of no checkpoint": (lambda p: ["export", p.folder()],
                                "data' is not a dfq checkpoint", "dfq quantize MODEL --out DIR"),
    "export over something else": (
        lambda p: ["export", p.checkpoint, "--format", "torch", "--out", p.file("model.pt2")],
        "model.pt2' is something other", "choose another out"),
    "batch of words": (lambda p: ["benchmark", p.checkpoint, "--batch", "all"],
                       "--batch is 'all'", "whole numbers"),
    "batch of none": (lambda p: ["benchmark", p.checkpoint, "--batch", "0"],
                      "batch has 0", "from 1 to 4096"),
    "runtime": (lambda p: ["benchmark", p.checkpoint, "--runtimes", "tvm"],
                "'tvm'", "dfq, dfq-compiled, torch-fp32"),
    "remove nothing": (lambda _: ["cache", "remove", "none"], "'none'", "there are: none"),
}  # fmt: skip

mistakes = pytest.mark.parametrize(
    ("command", "arrived", "allowed"), MISTAKES.values(), ids=MISTAKES.keys()
)


@mistakes
def test_a_mistake_is_explained(
    command: Callable[[Places], Args], arrived: str, allowed: str, places: Places
) -> None:
    ended = places.cli(*command(places))
    message = ended.stderr.rpartition("error: ")[2]
    assert ended.code == 2
    assert arrived in message
    assert allowed in message


@mistakes
def test_a_mistake_prints_one_json_object_where_json_is_asked_for(
    command: Callable[[Places], Args], arrived: str, allowed: str, places: Places
) -> None:
    ended = places.cli(*command(places), "--json")
    assert ended.code == 2
    assert list(ended.json) == ["error"]
    assert ended.json["error"]["type"].endswith("Error")
    assert arrived in ended.json["error"]["message"]
    assert allowed in ended.json["error"]["message"]


def test_an_input_range_goes_from_invert_to_the_dataset_and_its_calibration(places: Places) -> None:
    """A range below 0 begins with a hyphen."""
    images, span = places.tmp / "images", ["--input-range", "-1,1"]
    assert places.cli(*invert_with("--out", str(images), *span)(places)).code == 0
    facts = places.cli("inspect", images, "--json").json["preprocessing"]
    assert facts == {"input_range": [-1.0, 1.0], "mean": [0.0] * 3, "std": [1.0] * 3}
    calibrated = quantize_with("--calibration", str(images))(places)
    other = places.cli(*calibrated)
    assert other.code == 2
    assert "was made from another model" in " ".join(other.stderr.split())
    done = places.cli(*calibrated, *span, "--json")
    assert done.code == 0, done.stderr
    assert dfq.load(done.json["checkpoint"]).preprocessing.input_range == (-1.0, 1.0)


@pytest.mark.parametrize("name", ["no images", "bits", "unknown model", "missing data"])
def test_a_mistake_leaves_nothing_behind(name: str, places: Places) -> None:
    places.cli(*MISTAKES[name][0](places))
    assert not list(places.tmp.iterdir())
    assert not list(Path(os.environ["DFQ_CACHE"]).iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["quantize"],
        ["quantize", MODEL, "--bit", "4"],
        ["quantize", MODEL, "--bits", "four"],
        ["quantize", MODEL, "more"],
        ["evaluate", "checkpoint"],
        ["inspect", "data", "--rows", "x"],
        ["cache", "remove"],
        ["quantise", MODEL],
    ],
    ids=" ".join,
)
def test_arguments_of_no_command_exit_with_2(args: list[str], cli: Cli) -> None:
    ended = cli(*args)
    assert ended.code == 2
    assert "Usage:" in ended.stderr
    assert ended.stdout == ""
    ended = cli(*args, "--json")
    assert ended.code == 2
    assert ended.json["error"]["type"] == "UsageError"
    assert ended.json["error"]["message"]


@pytest.mark.parametrize("rows", ["0", "-1"])
def test_a_preview_has_at_least_one_row(rows: str, cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    ended = cli("inspect", tmp_path / "images", "--preview", tmp_path / "p.png", "--rows", rows)
    assert ended.code == 2
    assert f"rows is {rows}" in ended.stderr


def test_a_checkpoint_with_files_of_the_users_stays(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("years of work")
    before = listing(tmp_path)
    ended = cli.quantize(tmp_path / "out")
    assert ended.code == 2
    assert "also holds 'notes.txt'" in ended.stderr
    assert listing(tmp_path) == before


def test_what_a_terminal_obeys_is_printed_as_text(
    cli: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"] = "a\x1b[31mb"
    config["source"]["\x1b]0;title\x07"] = "[bold]x"
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    shown = cli("inspect", tmp_path / "c").stdout
    assert "\x1b" not in shown
    assert "\\x1b[31mb" in shown
    ended = cli("quantize", "x\x1b[31m", "--out", tmp_path / "out")
    assert "\x1b" not in ended.stderr


def test_a_name_too_long_is_a_message(cli: Cli) -> None:
    ended = cli("inspect", "a" * 300, "--json")
    assert ended.code == 2
    assert ended.json["error"]["message"].startswith("path is 'aaa")
    assert "300 bytes" in ended.json["error"]["message"]


def test_a_dataset_is_calibrated_on_whole(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    few = ("--images", "3", "--calibration", tmp_path / "images")
    ended = cli("quantize", *cli.model, "--out", tmp_path / "out", *few)
    assert ended.code == 2
    assert "images is 3, but the dataset" in ended.stderr


def test_a_checkpoint_of_another_scheme_is_replaced_with_a_note(cli: Cli, tmp_path: Path) -> None:
    note = "holds test_vit w8a8, which will be replaced"
    assert note not in cli.quantize(tmp_path / "out").stderr
    assert note not in cli.quantize(tmp_path / "out").stderr
    assert note in cli.quantize(tmp_path / "out", "--bits", "4").stderr


def test_a_checkpoint_does_not_replace_something_else(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out" / "more").mkdir(parents=True)
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = listing(tmp_path)
    ended = cli.quantize(tmp_path / "out")
    assert ended.code == 2
    assert "Nothing there was touched" in ended.stderr
    assert listing(tmp_path) == before


def test_a_checkpoint_does_not_replace_another_programs_config(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "vit"}')
    before = listing(tmp_path)
    assert cli.quantize(tmp_path / "out").code == 2
    assert listing(tmp_path) == before


def test_a_checkpoint_does_not_replace_a_dataset(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    before = listing(tmp_path)
    assert cli.quantize(tmp_path / "images").code == 2
    assert listing(tmp_path) == before


def test_a_dataset_does_not_replace_something_else(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = listing(tmp_path)
    ended = cli.invert("--out", tmp_path / "out")
    assert ended.code == 2
    assert "thesis.tex" in ended.stderr
    assert listing(tmp_path) == before


def test_a_dataset_does_not_replace_one_of_other_settings(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "out", "--seed", "0")
    before = listing(tmp_path)
    ended = cli.invert("--out", tmp_path / "out", "--seed", "1")
    assert ended.code == 2
    assert "other settings (inversion differ)" in ended.stderr
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ended = cli.quantize(tmp_path / "locked" / "out")
    assert ended.code == 2
    assert "Permission denied" in ended.stderr


def test_an_unreadable_image_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_text("not an image")
    ended = cli.quantize(tmp_path / "out", "--calibration", tmp_path / "images")
    assert ended.code == 2
    assert "x.png' cannot be read as an image" in ended.stderr


def test_an_interrupt_exits_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dfq, "invert", interrupt, raising=False)
    monkeypatch.setattr(dfq, "evaluate", interrupt, raising=False)
    ended = cli.invert()
    assert ended.code == 130
    assert "run it again to go on" in ended.stderr
    ended = cli("evaluate", "x", "--data", "y", "--json")
    assert ended.code == 130
    assert ended.json["error"] == {"type": "KeyboardInterrupt", "message": "Interrupted."}
    assert "kept" not in ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=repr,
)
def test_full_memory_is_a_message(
    error: Exception, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(dfq, "invert", fail, raising=False)
    ended = cli.invert("--json")
    assert ended.code == 1
    assert ended.stderr.startswith("error: Out of memory")
    assert ended.json["error"]["type"] == "MemoryError"


def test_other_errors_are_not_hidden(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(dfq, "invert", fail, raising=False)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.invert()


# ---- help


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())
every_command = pytest.mark.parametrize("name", COMMANDS)


def test_the_commands_are_these() -> None:
    assert list(COMMANDS) == [
        "quantize",
        "invert",
        "evaluate",
        "distill",
        "export",
        "benchmark",
        "inspect",
        "models",
        "recipes",
        "doctor",
        "cache list",
        "cache verify",
        "cache remove",
    ]


@every_command
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(name: str, flag: str, cli: Cli) -> None:
    ended = cli(*name.split(), flag)
    assert ended.code == 0
    assert COMMANDS[name].help.split("\n")[0].rstrip(".")[:40] in ended.stdout


@every_command
def test_every_command_shows_an_example(name: str, cli: Cli) -> None:
    shown = cli(*name.split(), "--help").stdout
    assert f"Example: dfq {name}" in shown
    assert "[bold]" not in shown


@every_command
def test_every_example_can_be_parsed(name: str) -> None:
    example = COMMANDS[name].epilog.removeprefix("Example: [bold]").removesuffix("[/]")
    words = shlex.split(example)[1 + len(name.split()) :]
    assert COMMANDS[name].make_context(name, words).params


@every_command
def test_every_option_is_explained(name: str) -> None:
    assert all(p.help for p in COMMANDS[name].params if p.name != "help")


@pytest.mark.parametrize("args", [["--help"], ["-h"]], ids=str)
def test_help_lists_every_command(args: list[str], cli: Cli) -> None:
    shown = cli(*args).stdout
    assert all(name.split()[0] in shown for name in COMMANDS)


def test_the_version_is_printed(cli: Cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.stdout) == (0, f"dfq {dfq.__version__}\n")


# ---- real processes


def process(args: list[str], cache: Path) -> subprocess.Popen[str]:
    """``python -m dfq`` that can be interrupted, even where this process cannot."""
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('dfq', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DFQ_CACHE": str(cache)},
    )


def test_a_process_prints_the_result_alone_on_stdout(weights_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dfq", "quantize", "vit_tiny_patch16_224", *FAST, "--json"]
    command += ["--weights", str(weights_file), "--img-size", "32", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert_schema(json.loads(ended.stdout), QuantizeResult)
    assert "Inverting" in ended.stderr


def test_a_process_ends_a_mistake_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dfq", "quantize", "vit_bse", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: Unknown model 'vit_bse'")
    assert "Traceback" not in ended.stderr


def test_a_process_says_its_version() -> None:
    command = [sys.executable, "-m", "dfq", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"dfq {dfq.__version__}\n"


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent to a process")
def test_an_interrupted_inversion_goes_on_to_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[inversion]\nunit_size = 1\nimages = 12\nstages = 2\niterations = 50\n")
    args = ["invert", *cli.model, "--recipe", str(recipe), "--threads", "1", "--out"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"

    running = process([*args, str(broken)], tmp_path / "cache")
    while running.poll() is None and not list(broken.glob("shard-00000-*.safetensors")):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130
    assert "Interrupted" in said
    assert "Traceback" not in said
    assert not (broken / "manifest.json").exists()

    again = process([*args, str(broken)], tmp_path / "cache")
    _, said = again.communicate()
    assert again.returncode == 0
    assert "Resuming: " in said

    assert cli(*args, whole).code == 0
    assert listing(broken) == listing(whole)
