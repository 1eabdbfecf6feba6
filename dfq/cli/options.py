"""Options of the commands, each declared once, and parsers of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dfq.cli import completion
from dfq.cli.completion import Complete, one_of
from dfq.cli.flags import parsed_json
from dfq.errors import SettingError
from dfq.inversion.schedules import METHODS

MODEL, INVERSION, DISTILLATION, QUANTIZATION, EVALUATION, OUTPUT = PANELS = (
    "Model",
    "Inversion",
    "Distillation",
    "Quantization",
    "Evaluation",
    "Output",
)
"""Panels of ``--help``, in the order in which every command shows them."""

SOURCE = "METHOD|PATH"
CHANNELS = "NUMBER,..."


def _option(
    panel: str,
    metavar: str | None,
    help: str,
    *flags: str,
    default: str | bool = False,
    complete: Complete | None = None,
) -> Any:
    """Declare an option of a panel; ``default``: default shown in the help, False for none."""
    return typer.Option(
        *flags,
        metavar=metavar,
        help=help,
        show_default=default,
        rich_help_panel=panel,
        autocompletion=complete,
    )


def _choice(
    panel: str, names: Sequence[str], help: str, *flags: str, default: str | bool = False
) -> Any:
    """Declare an option with a choice of names; the command checks the name."""
    metavar, complete = f"[{'|'.join(names)}]", one_of(names)
    return _option(panel, metavar, help, *flags, default=default, complete=complete)


def _argument(metavar: str, help: str, complete: Complete | None = None) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False, autocompletion=complete)


# ---- arguments

Model = Annotated[
    str,
    _argument(
        "MODEL",
        "A timm name, an alias (vit_base, deit_small, ...), hf-hub:NAME, local-dir:FOLDER, "
        "a student's directory, or 'demo'.",
        completion.models,
    ),
]
Checkpoint = Annotated[Path, _argument("CHECKPOINT", "Checkpoint directory.")]
Inspected = Annotated[
    str,
    _argument(
        "PATH|MODEL",
        "A dataset, a checkpoint or a student's directory; where there is none of that name, a "
        "model as for quantize.",
        completion.models,
    ),
]
Pattern = Annotated[str | None, _argument("[FILTER]", "Text that the names contain.")]
CachedName = Annotated[str, _argument("NAME", "An entry's name or its start, or 'all'.")]

# ---- model

Weights = Annotated[
    Path | None, _option(MODEL, "FILE", "Weights to load: safetensors, or a torch file.")
]
NumClasses = Annotated[
    int | None, _option(MODEL, "N", "Classes of the head; 0 for a model without one.")
]
ImgSize = Annotated[
    str | None, _option(MODEL, "N|H,W", "Input in pixels: a square's side, or height and width.")
]
InChans = Annotated[int | None, _option(MODEL, "N", "Channels of the input, at least 1.")]
GlobalPool = Annotated[
    str | None, _choice(MODEL, ("token", "avg", "map"), "Pooling of the tokens.")
]
Mean = Annotated[
    str | None,
    _option(
        MODEL,
        CHANNELS,
        "Mean per channel, of pixels / 255 or in the units of --input-range: 0.5,0.5,0.5.",
    ),
]
Std = Annotated[
    str | None, _option(MODEL, CHANNELS, "Standard deviation per channel, in the units of --mean.")
]
InputRange = Annotated[
    str | None,
    _option(
        MODEL,
        "LOW,HIGH",
        "Lowest and highest value of the data before normalization, in the units of --mean "
        "and --std, which are then 0 and 1 by default: 0,255 or -1024,3071.",
        default="0,1: pixels / 255",
    ),
]
Float = Annotated[
    str | None,
    _option(
        MODEL,
        "MODEL",
        "The float model, to measure agreement.",
        "--float",
        complete=completion.models,
    ),
]
Device = Annotated[
    str,
    _option(
        MODEL,
        "DEVICE",
        "Device: cpu, cuda, cuda:1, ...",
        default=True,
        complete=one_of(("cpu", "cuda")),
    ),
]
Engine = Annotated[
    str,
    _choice(
        MODEL,
        ("torch", "openvino", "onnxruntime", "auto"),
        "Runtime of the checkpoint; auto: as dfq.load chooses.",
        "--runtime",
        default=True,
    ),
]
Backend = Annotated[
    str | None,
    _choice(
        MODEL,
        ("onednn", "int_mm", "float", "reference"),
        "Kernels of the integer products.",
        default="fastest",
    ),
]

# ---- inversion

InversionMethod = Annotated[
    str | None,
    _choice(INVERSION, tuple(METHODS), "Inversion method.", "--method", default="pri"),
]
Calibration = Annotated[
    str | None,
    _option(
        INVERSION,
        SOURCE,
        f"Calibration images: {', '.join(METHODS)}, or a dataset, an image folder or .npz.",
        default="pri",
        complete=completion.methods,
    ),
]
TrainingData = Annotated[
    str | None,
    _option(
        INVERSION,
        SOURCE,
        f"Training images: {', '.join(METHODS)}, or a dataset, an image folder or .npz.",
        "--data",
        default="pri",
        complete=completion.methods,
    ),
]
Images = Annotated[
    int | None,
    _option(INVERSION, "N", "Images to make or to calibrate on, at least 1.", default="32"),
]
TrainingImages = Annotated[
    int | None,
    _option(
        INVERSION, "N", "Images to make or to train on, at least 1.", "--images", default="512"
    ),
]
Iterations = Annotated[
    int | None, _option(INVERSION, "N", "Iterations of a trajectory, at least 1.", default="48")
]
Stages = Annotated[
    int | None,
    _option(INVERSION, "N", "PRI: images that a trajectory yields, at least 1.", default="4"),
]
Precision = Annotated[
    str | None,
    _choice(
        INVERSION,
        ("auto", "float32", "bfloat16", "int8"),
        "Precision of inversion; auto: bfloat16 where the device is faster with it.",
        default="auto",
    ),
]
Threads = Annotated[
    int | None,
    _option(INVERSION, "N", "CPU threads of inversion; recorded.", default="torch's"),
]
Seed = Annotated[
    int | None,
    _option(INVERSION, "N", "Seed of all random numbers: same seed, same bytes.", default="0"),
]
RecipeFile = Annotated[
    str | None,
    _option(
        INVERSION,
        "NAME|FILE",
        "Settings of inversion and what follows: a name that dfq recipes lists, or a TOML "
        "file; flags override them.",
        complete=completion.recipes,
    ),
]

# ---- distillation

Student = Annotated[
    str | None,
    _option(
        DISTILLATION,
        "NAME",
        "timm's name of the student.",
        default="the teacher's model",
        complete=completion.models,
    ),
]
Depth = Annotated[int | None, _option(DISTILLATION, "N", "Blocks of the student.")]
Width = Annotated[int | None, _option(DISTILLATION, "N", "Embedding width of the student.")]
Heads = Annotated[int | None, _option(DISTILLATION, "N", "Attention heads of the student.")]
Steps = Annotated[
    int | None, _option(DISTILLATION, "N", "Training steps, at least 1.", default="2000")
]
Start = Annotated[
    str | None,
    _choice(
        DISTILLATION,
        ("auto", "teacher", "random"),
        "Initialization of the student; auto: the teacher's weights if they fit.",
        default="auto",
    ),
]

# ---- quantization

Bits = Annotated[
    int | None,
    _option(
        QUANTIZATION,
        "N",
        "Bits of the weights, 2 to 8; activations have 8 unless a recipe says fewer.",
        default="8",
    ),
]
Attention = Annotated[
    str | None,
    _choice(QUANTIZATION, ("float", "int8"), "Arithmetic of attention.", default="float"),
]
Activations = Annotated[
    str | None,
    _choice(
        QUANTIZATION,
        ("asymmetric", "symmetric"),
        "Inputs of layers; symmetric: signed with zero point 0, as TensorRT requires.",
        default="asymmetric",
    ),
]

# ---- evaluation

_IMAGES = "image folder, with labels as class folders, or .npz, or 'demo'."

Eval = Annotated[str | None, _option(EVALUATION, "DIR|FILE", f"Images to measure on: {_IMAGES}")]
TestData = Annotated[
    str, _option(EVALUATION, "DIR|FILE", f"Images to measure on: {_IMAGES}", "--data")
]
ClassMap = Annotated[
    Path | None,
    _option(
        EVALUATION,
        "FILE",
        "Indices of class folders: .txt, a name a line, or .json, {name: index}.",
    ),
]
NoEvaluate = Annotated[
    bool,
    _option(
        EVALUATION,
        None,
        "Skip the comparison with the float model; not with --eval.",
        "--no-evaluate",
    ),
]
MinAgreement = Annotated[
    float | None,
    _option(
        EVALUATION,
        "SHARE",
        "Fail (exit 1) if agreement's 95 % interval begins below this, 0 to 1.",
    ),
]
MinAccuracy = Annotated[
    float | None,
    _option(
        EVALUATION, "SHARE", "Fail (exit 1) if top-1's 95 % interval begins below this, 0 to 1."
    ),
]
Batch = Annotated[str, _option(EVALUATION, "N,...", "Batch sizes, each at least 1.", default=True)]
RuntimeSeconds = Annotated[
    float,
    _option(
        EVALUATION,
        "SECONDS",
        "Limit of each runtime and batch size, above 0; one call may exceed it.",
        "--seconds",
        default=True,
    ),
]
TotalSeconds = Annotated[
    float | None,
    _option(EVALUATION, "SECONDS", "Limit of the whole run, above 0.", default="none"),
]
RuntimeThreads = Annotated[
    int | None,
    _option(EVALUATION, "N", "CPU threads of every runtime.", "--threads", default="torch's"),
]
Runtimes = Annotated[
    str | None,
    _option(
        EVALUATION, "NAME,...", "Runtimes to measure.", default="all but the -compiled of a CPU"
    ),
]
SaveSpeeds = Annotated[
    bool,
    _option(OUTPUT, None, "Record the fastest runtime; dfq.load then takes it.", "--save"),
]
Cold = Annotated[bool, _option(EVALUATION, None, "Also measure cold starts.", "--cold")]

# ---- output

CheckpointOut = Annotated[
    Path | None,
    _option(OUTPUT, "DIR", "Directory of the checkpoint.", "--out", default="./MODEL-SCHEME"),
]
DatasetOut = Annotated[
    Path | None,
    _option(OUTPUT, "DIR", "Directory of the dataset.", "--out", default="in the cache"),
]
StudentOut = Annotated[
    Path | None,
    _option(OUTPUT, "DIR", "Directory of the student.", "--out", default="./MODEL-student"),
]
ExportOut = Annotated[
    Path | None,
    _option(
        OUTPUT,
        "FILE",
        "File to write: .onnx, .xml (with a .bin beside it) or .pt2.",
        "--out",
        default="./CHECKPOINT with the suffix",
    ),
]
ExportFormat = Annotated[
    str,
    _choice(
        OUTPUT,
        ("onnx", "openvino", "torch", "tensorrt"),
        "Format of the file, or the runtime that it is for.",
        "--format",
        "--target",
        default=True,
    ),
]
ExportWeights = Annotated[
    str | None,
    _choice(
        OUTPUT,
        ("int8", "int4"),
        "4-bit weights in ONNX: int8 (widened without loss; products run on integers) or int4 "
        "(a smaller file; ONNX Runtime then computes in float).",
        "--weights",
        default="int8",
    ),
]
Preview = Annotated[Path | None, _option(OUTPUT, "FILE", "Draw a dataset into this PNG file.")]
Rows = Annotated[
    int | None, _option(OUTPUT, "N", "Trajectories to draw, with --preview.", default="8")
]
Layers = Annotated[
    bool,
    _option(
        OUTPUT, None, "Signal to quantization noise of every layer of a checkpoint.", "--layers"
    ),
]
Cache = Annotated[
    Path | None, _option(OUTPUT, "DIR", "Cache directory; else $DFQ_CACHE, else the user's.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON only: an object, or an array for lists.",
        rich_help_panel=OUTPUT,
        is_eager=True,
        callback=parsed_json,
    ),
]
Quiet = Annotated[bool, _option(OUTPUT, None, "Show no progress and no table.", "--quiet", "-q")]


def floats(text: str | None, flag: str, example: str = "0.5,0.5,0.5") -> list[float] | None:
    """Parse comma-separated numbers; raises :class:`SettingError` for other text."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingError(
            f"{flag} is {text!r}; give numbers separated by commas, such as {example}."
        ) from None


def counts(text: str, flag: str, example: str) -> list[int]:
    """Parse comma-separated whole numbers; raises :class:`SettingError` for other text."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingError(
            f"{flag} is {text!r}; give whole numbers separated by commas, such as {example}."
        ) from None


def sides(text: str | None) -> int | list[int] | None:
    """Parse an image size: one side, or height and width."""
    if text is None:
        return None
    sides = counts(text, "--img-size", "224 or 192,256")
    return sides[0] if len(sides) == 1 else sides
