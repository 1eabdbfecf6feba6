"""Mistakes on the command line: messages, exit codes, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import FAST, MODEL, Cli
from PIL import Image
from safetensors.torch import load_file, save_file

import dfq
from dfq import runtime


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


def test_what_a_link_leads_to_is_replaced(cli: Cli, tmp_path: Path, cli_checkpoint: Path) -> None:
    shutil.copytree(cli_checkpoint, tmp_path / "v1")
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


def test_a_preview_replaces_its_own_pictures_alone(cli: Cli, tmp_path: Path) -> None:
    assert cli.invert("--out", tmp_path / "images").code == 0
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    ended = cli("inspect", tmp_path / "images", "--preview", tmp_path / "mine.png")
    assert ended.code == 2
    assert "is something other than a picture that dfq wrote" in ended.stderr
    assert (tmp_path / "mine.png").read_bytes() == before
    for _ in range(2):
        assert cli("inspect", tmp_path / "images", "--preview", tmp_path / "a.png").code == 0


def test_a_cache_that_is_a_file_is_no_empty_cache(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    ended = cli("cache", "list", "--cache", tmp_path / "cache")
    assert ended.code == 2
    assert "is a file, not a directory" in ended.stderr


# ---- mistakes


@dataclass(frozen=True)
class Places:
    """Files for the arguments of wrong commands."""

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
def places(cli: Cli, tmp_path: Path, labeled_npz: Path, cli_checkpoint: Path) -> Places:
    return Places(cli, tmp_path, labeled_npz, cli_checkpoint)


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
    "bits": (quantize_with("--bits", "9"), "--bits is 9", "2 to 8"),
    "no images": (quantize_with("--images", "0"), "--images is 0", "from 1 to"),
    "fewer than no images": (quantize_with("--images", "-1"), "--images is -1", "from 1 to"),
    "no iterations": (quantize_with("--iterations", "0"), "--iterations is 0", "from 1 to"),
    "more stages than patches": (quantize_with("--stages", "5", "--iterations", "9"),
                                 "5 stages, but only 4 patches", "--stages 4"),
    "more stages than iterations": (quantize_with("--stages", "4", "--iterations", "3"),
                                    "4 stages, but only 3 iterations", "--stages 3"),
    "no stages": (invert_with("--stages", "0"), "--stages is 0", "from 1 to"),
    "seed": (quantize_with("--seed", "-1"), "--seed is -1", "from 0 to 2147483647"),
    "threads": (quantize_with("--threads", "0"), "--threads is 0", "from 1 to"),
    "attention": (quantize_with("--attention", "int4"), "--attention is 'int4'", "float, int8"),
    "activations": (
        quantize_with("--activations", "symetric"),
        "--activations is 'symetric'",
        "asymmetric, symmetric",
    ),
    "calibration": (quantize_with("--calibration", "pry"), "'pry'", "pri, smi, dmi, noise"),
    "method": (invert_with("--method", "prr"), "--method is 'prr'", "pri, smi, dmi, noise"),
    "typo in a method": (invert_with("--method", "nois"), "'nois'", "Did you mean 'noise'"),
    "device": (quantize_with("--device", "tpu"),
               "'tpu' cannot be used (dfq runs on cpu and cuda)", "available: cpu"),
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
    "bound": (quantize_with("--min-agreement", "90"), "--min-agreement is 90", "0 to 1"),
    "bound without data": (quantize_with("--min-accuracy", "0.5"), "--min-accuracy", "--eval DATA"),
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
    "backend": (evaluate_with("--backend", "cublas"), "--backend is 'cublas'",
                ", ".join(runtime.backends())),
    "engine": (evaluate_with("--runtime", "tvm"), "--runtime is 'tvm'",
               "auto, torch, openvino, onnxruntime"),
    "agreement without a model": (evaluate_with("--min-agreement", "0.5"),
                                  "--min-agreement", "--float MODEL"),
    "weights without a model": (evaluate_with("--weights", "w.pth"), "--weights", "--float MODEL"),
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
                      "--format is 'tflite'", "onnx, openvino, torch"),
    "export suffix": (lambda p: ["export", p.checkpoint, "--out", p.tmp / "model.pt"],
                      "model.pt'", "ends in .onnx"),
    "export of no checkpoint": (lambda p: ["export", p.folder()],
                                "data' is not a dfq checkpoint", "dfq quantize MODEL --out DIR"),
    "export over something else": (
        lambda p: ["export", p.checkpoint, "--format", "torch", "--out", p.file("model.pt2")],
        "model.pt2' is something other", "choose another name"),
    "batch of words": (lambda p: ["benchmark", p.checkpoint, "--batch", "all"],
                       "--batch is 'all'", "whole numbers"),
    "batch of none": (lambda p: ["benchmark", p.checkpoint, "--batch", "0"],
                      "--batch has 0", "from 1 to 4096"),
    "runtime": (lambda p: ["benchmark", p.checkpoint, "--runtimes", "tvm"],
                "'tvm'", "dfq, dfq-compiled, dfq-eager, torch-fp32"),
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
    assert f"--rows is {rows}" in ended.stderr


def test_a_name_too_long_is_a_message(cli: Cli) -> None:
    ended = cli("inspect", "a" * 300, "--json")
    assert ended.code == 2
    assert ended.json["error"]["message"].startswith("PATH is 'aaa")
    assert "300 bytes" in ended.json["error"]["message"]
