"""Messages name parameters for callers from Python, and flags on the command line."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import typer
from api_calls import FAST as SETTINGS
from command_line import FAST, MODEL, Cli

import dfq
from dfq.argument_names import flag_names, option, parameter_names
from dfq.cli.app import app

SOURCES = [
    path
    for path in sorted(Path(dfq.__file__).parent.rglob("*.py"))
    if "cli" not in path.parts and path.name != "train.py"
]
VERBS = ("quantize", "invert", "evaluate", "distill", "export", "benchmark", "inspect", "models")
PYTHON_ONLY = {"settings", "progress"}
"""Parameters of verbs that are no flags."""

# ---- the rule


def test_names_are_parameters_unless_the_command_line_says_otherwise() -> None:
    assert option("img_size") == "img_size"
    assert option("stages", 4) == "stages=4"
    assert option("global_pool", "avg") == "global_pool='avg'"
    assert option("eval", metavar="DATA") == "eval"
    with flag_names(out="--preview"):
        assert option("img_size") == "--img-size"
        assert option("img_size", (192, 256)) == "--img-size 192,256"
        assert option("stages", 0) == "--stages 0"
        assert option("global_pool", "avg") == "--global-pool avg"
        assert option("eval", metavar="DATA") == "--eval DATA"
        assert (option("float_model"), option("model")) == ("--float", "MODEL")
        assert option("evaluate", False) == "--no-evaluate"
        assert option("out") == "--preview"
        with parameter_names():
            assert option("img_size") == "img_size"
        assert option("img_size") == "--img-size"
    assert option("out") == "out"


def test_the_command_line_names_flags_only_while_it_runs(cli: Cli) -> None:
    assert "--bits is 9" in cli("quantize", "demo", "--bits", "9").stderr
    assert option("bits") == "bits"


# ---- every name exists


def parameters(verb: str) -> set[str]:
    return set(inspect.signature(getattr(dfq, verb)).parameters)


def flags(verb: str) -> set[str]:
    command = cast(Any, typer.main.get_command(app)).commands[verb]
    return {flag for each in command.params for flag in each.opts}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node


NAME_AT = {"option": 0, "check_alone": 1, "check_measurable": 4, "check_decidable": 0}
"""Functions whose messages name an argument, and which of their arguments names it."""


def named() -> set[str]:
    """Return the names of arguments in messages of the sources."""
    places = [
        node.args[NAME_AT[function]]
        for path in SOURCES
        for function, node in calls(path)
        if function in NAME_AT
    ]
    return {str(place.value) for place in places if isinstance(place, ast.Constant)}


def test_names_in_messages_are_parameters_and_flags() -> None:
    assert {"stages", "eval", "num_classes", "calibration", "class_map", "min_accuracy"} <= named()
    known = {name for verb in VERBS for name in parameters(verb)} | {"cache", "rows"}
    options = {flag for verb in VERBS for flag in flags(verb)} | {"--cache"}
    assert named() <= known
    with flag_names():
        assert {option(name) for name in named()} <= options


@pytest.mark.parametrize("verb", VERBS)
def test_every_parameter_of_a_verb_is_a_flag_of_its_command(verb: str) -> None:
    first, *others = inspect.signature(getattr(dfq, verb)).parameters
    with flag_names():
        assert option(first).isupper()
        assert {option(name) for name in others if name not in PYTHON_ONLY} <= flags(verb)


# ---- no flag stands in a message


def texts(path: Path) -> Iterator[str]:
    """String literals of a file that are no docstrings; what they are formatted with as ``{}``."""
    tree = ast.parse(path.read_text())
    inner = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(getattr(part, "value", "{}")) for part in node.values)
        elif isinstance(node, ast.Constant) and id(node) not in inner | docs:
            yield str(node.value)


def test_flags_stand_only_in_whole_commands() -> None:
    commands = re.compile(r"`dfq [^`]*`")
    rule = Path(dfq.__file__).with_name("argument_names.py")
    for path in (path for path in SOURCES if path != rule):
        for text in texts(path):
            assert not re.search(r"--[a-z]", commands.sub("", text)), f"{path}: {text}"


# ---- the same mistake, from Python and on the command line


@dataclass(frozen=True)
class Mistake:
    """A call and the same command, the words that both must explain, and their names of it."""

    call: Callable[[Places], Any]
    command: Callable[[Places], list[Any]]
    python: str
    flag: str


@dataclass(frozen=True)
class Places:
    weights: Path
    tmp: Path
    npz: Path
    checkpoint: Path

    def file(self, text: str = "") -> Path:
        path = self.tmp / "file"
        path.write_text(text)
        return path


SMALL: dict[str, Any] = {"img_size": 32, "images": 4, "settings": {"inversion": SETTINGS}}


def quantize(**changes: Any) -> Callable[[Places], Any]:
    def call(p: Places) -> Any:
        made = {k: v(p) if callable(v) else v for k, v in changes.items()}
        return dfq.quantize(MODEL, **{**SMALL, "weights": p.weights, "out": p.tmp / "out", **made})

    return call


def command(*words: Any, verb: str = "quantize") -> Callable[[Places], list[Any]]:
    def make(p: Places) -> list[Any]:
        made = [word(p) if callable(word) else word for word in words]
        size = [] if "--img-size" in words else ["--img-size", "32"]
        return [verb, MODEL, "--weights", p.weights, *size, *FAST, "--out", p.tmp / "out", *made]

    return make


def other(verb: str, *words: Any) -> Callable[[Places], list[Any]]:
    return lambda p: [verb, p.checkpoint, *(w(p) if callable(w) else w for w in words)]


def flat(p: Places) -> Path:
    return p.file("a\nb\n")


MISTAKES = {
    "out of range": Mistake(
        quantize(images=0), command("--images", "0"), "images is 0", "--images is 0"),
    "unknown choice": Mistake(
        quantize(attention="int4"), command("--attention", "int4"),
        "attention is 'int4'", "--attention is 'int4'"),
    "too many stages": Mistake(
        quantize(stages=5, iterations=9), command("--stages", "5", "--iterations", "9"),
        "at most stages=4.", "at most --stages 4."),
    "bound": Mistake(
        quantize(min_agreement=90.0), command("--min-agreement", "90"),
        "min_agreement is 90", "--min-agreement is 90"),
    "bound without data": Mistake(
        quantize(min_accuracy=0.5), command("--min-accuracy", "0.5"),
        "min_accuracy needs data to measure it on: give eval.",
        "--min-accuracy needs data to measure it on: give --eval DATA."),
    "bound that images cannot decide": Mistake(
        quantize(min_agreement=0.99), command("--min-agreement", "0.99"),
        "give real ones (eval), or invert as many (images=368)",
        "give real ones (--eval DATA), or invert as many (--images 368)"),
    "class map without data": Mistake(
        quantize(class_map=flat), command("--class-map", flat),
        "class_map numbers the class folders of eval",
        "--class-map numbers the class folders of --eval"),
    "class map of no folder": Mistake(
        quantize(class_map=flat, eval=lambda p: p.npz),
        command("--class-map", flat, "--eval", lambda p: p.npz),
        "Leave class_map out.", "Leave --class-map out."),
    "image size": Mistake(
        quantize(img_size=8), command("--img-size", "8"), "img_size is 8", "--img-size is 8"),
    "channels": Mistake(
        quantize(in_chans=1), command("--in-chans", "1"),
        "Leave in_chans out", "Leave --in-chans out"),
    "pooling": Mistake(
        quantize(global_pool="max"), command("--global-pool", "max"),
        "global_pool is 'max'", "--global-pool is 'max'"),
    "classes": Mistake(
        quantize(num_classes=6), command("--num-classes", "6"),
        "Use num_classes=5.", "Use --num-classes 5."),
    "number of means": Mistake(
        quantize(mean=[0.5]), command("--mean", "0.5"),
        "Give mean 3 values.", "Give --mean 3 values."),
    "units of mean": Mistake(
        quantize(mean=[127.5] * 3), command("--mean", "127.5,127.5,127.5"),
        "give mean=[0.5, 0.5, 0.5].", "give --mean 0.5,0.5,0.5."),
    "input range": Mistake(
        quantize(input_range=[1.0, -1.0]), command("--input-range", "1,-1"),
        "input_range is 1 to -1", "--input-range is 1 to -1"),
    "output that is a file": Mistake(
        quantize(out=Places.file), command("--out", Places.file),
        "is a file; out takes a directory", "is a file; --out takes a directory"),
    "long name": Mistake(
        quantize(recipe="r" * 300), command("--recipe", "r" * 300),
        "recipe is 'rrr", "--recipe is 'rrr"),
    "long model": Mistake(
        lambda _: dfq.quantize("m" * 300), lambda _: ["quantize", "m" * 300],
        "model is 'mmm", "MODEL is 'mmm"),
    "agreement without a model": Mistake(
        lambda p: dfq.evaluate(p.checkpoint, data=p.npz, min_agreement=0.5),
        other("evaluate", "--data", lambda p: p.npz, "--min-agreement", "0.5"),
        "give float_model.", "give --float MODEL."),
    "weights without a model": Mistake(
        lambda p: dfq.evaluate(p.checkpoint, data=p.npz, weights="w"),
        other("evaluate", "--data", lambda p: p.npz, "--weights", "w"),
        "weights describes the float model; name it too, by float_model.",
        "--weights describes the float model; name it too, by --float MODEL."),
    "too little data": Mistake(
        lambda p: dfq.evaluate(p.checkpoint, data=p.npz, min_accuracy=0.999),
        other("evaluate", "--data", lambda p: p.npz, "--min-accuracy", "0.999"),
        "give more data (data)", "give more data (--data)"),
    "format": Mistake(
        lambda p: dfq.export(p.checkpoint, format="tflite"),
        other("export", "--format", "tflite"), "format is 'tflite'", "--format is 'tflite'"),
    "weights of another format": Mistake(
        lambda p: dfq.export(p.checkpoint, format="torch", weights="int8"),
        other("export", "--format", "torch", "--weights", "int8"),
        "weights is a choice of format='onnx' alone",
        "--weights is a choice of --format onnx alone"),
    "batch": Mistake(
        lambda p: dfq.benchmark(p.checkpoint, batch=[0]),
        other("benchmark", "--batch", "0"), "batch has 0", "--batch has 0"),
    "depth": Mistake(
        lambda p: dfq.distill("demo", depth=0, out=p.tmp / "out"),
        lambda p: ["distill", "demo", "--depth", "0", "--out", p.tmp / "out"],
        "depth is 0", "--depth is 0"),
    "heads": Mistake(
        lambda p: dfq.distill("demo", width=100, heads=3, out=p.tmp / "out"),
        lambda p: ["distill", "demo", "--width", "100", "--heads", "3", "--out", p.tmp / "out"],
        "width is 100, heads 3", "--width is 100, --heads 3"),
    "rows": Mistake(
        lambda p: dfq.preview(p.checkpoint, p.tmp / "x.png", rows=0),
        lambda p: ["inspect", p.checkpoint, "--preview", p.tmp / "x.png", "--rows", "0"],
        "rows is 0", "--rows is 0"),
    "long picture": Mistake(
        lambda p: dfq.preview(p.checkpoint, "p" * 300),
        lambda p: ["inspect", p.checkpoint, "--preview", "p" * 300],
        "out is 'ppp", "--preview is 'ppp"),
}  # fmt: skip


@pytest.fixture
def places(cli: Cli, tmp_path: Path, labeled_npz: Path, cli_checkpoint: Path) -> Places:
    return Places(cli.weights, tmp_path, labeled_npz, cli_checkpoint)


mistakes = pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())


@mistakes
def test_python_is_told_the_parameter(mistake: Mistake, places: Places) -> None:
    with pytest.raises(dfq.UsageError) as caught:
        mistake.call(places)
    assert mistake.python in str(caught.value)
    assert "--" not in str(caught.value)


@mistakes
def test_the_command_line_is_told_the_flag(mistake: Mistake, places: Places, cli: Cli) -> None:
    ended = cli(*mistake.command(places))
    assert ended.code == 2
    assert mistake.flag in " ".join(ended.stderr.split())


RECIPE = "[inversion]\nstages = 0\n"


def test_a_recipe_is_told_its_key(places: Places, cli: Cli) -> None:
    """Its keys are the same for both, as the file is."""
    recipe = places.file(RECIPE)
    expected = f"Recipe {str(recipe)!r}, [inversion]: stages is 0; allowed: a whole number from 1"
    with pytest.raises(dfq.UsageError) as caught:
        dfq.quantize("demo", recipe=recipe)
    assert expected in str(caught.value)
    assert expected in " ".join(cli("quantize", "demo", "--recipe", recipe).stderr.split())


def test_warnings_of_a_result_name_what_the_caller_can_give() -> None:
    from dfq.quantization.diagnosis import low_sqnr_warnings
    from dfq.quantization.scheme import Scheme
    from dfq.results.values import LayerSqnr

    low = [LayerSqnr("blocks.0.mlp.fc1", 5.0, 40.0, 5.0)]
    scheme = Scheme(dfq.QuantizationSettings(bits=4))
    assert "(bits=8, or [layers] in a recipe)" in low_sqnr_warnings(low, scheme)[0]
    with flag_names():
        assert "(--bits 8, or [layers] in a recipe)" in low_sqnr_warnings(low, scheme)[0]


def test_torchrun_is_told_how_the_caller_takes_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfq.pipeline.workers import check_alone

    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(dfq.UsageError, match="then quantize with calibration='DIR'"):
        check_alone("quantize", "calibration")
    with flag_names(), pytest.raises(dfq.UsageError, match="then quantize with --calibration DIR"):
        check_alone("quantize", "calibration")
