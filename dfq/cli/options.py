"""Options that several commands share, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfq.cli.flags import parsed_json
from dfq.errors import SettingError

Model = Annotated[
    str,
    typer.Argument(
        help="A timm name, an alias (vit_base, deit_small, ...), hf-hub:NAME, local-dir:FOLDER, "
        "or 'demo'.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights to load: safetensors, or a torch file.", show_default=False),
]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the head.", show_default=False)]
ImgSize = Annotated[
    str | None,
    typer.Option(help="Input in pixels: a square's side, or HEIGHT,WIDTH.", show_default=False),
]
InChans = Annotated[int | None, typer.Option(help="Channels of the input.", show_default=False)]
GlobalPool = Annotated[
    str | None, typer.Option(help="Pooling: token, avg or map.", show_default=False)
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Per channel, of pixels / 255 or in the units of --input-range: 0.5,0.5,0.5",
        show_default=False,
    ),
]
Std = Annotated[str | None, typer.Option(help="As --mean.", show_default=False)]
InputRange = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Lowest and highest value of the data before normalisation, in the units of --mean "
        "and --std, which are then 0 and 1 by default: 0,255 or -1024,3071.",
        show_default="0,1: pixels / 255",
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Settings: a name that dfq recipes lists, or a TOML file; flags override them.",
        show_default=False,
    ),
]
Images = Annotated[
    int | None, typer.Option(help="Images to make or to calibrate on.", show_default="32")
]
Iterations = Annotated[
    int | None, typer.Option(help="Iterations of a trajectory.", show_default="48")
]
Stages = Annotated[
    int | None, typer.Option(help="PRI: images a trajectory yields.", show_default="4")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same bytes.", show_default="0")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of inversion; recorded.", show_default="torch's")
]
Precision = Annotated[
    str | None,
    typer.Option(help="Of inversion: auto, float32, bfloat16 or int8.", show_default="auto"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Cache directory; else $DFQ_CACHE, else the user's.", show_default=False),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="JSON alone on stdout: an object, of lists an array.",
        is_eager=True,
        callback=parsed_json,
    ),
]
NoEvaluate = Annotated[
    bool,
    typer.Option(
        "--no-evaluate", help="Do not compare with the float model; faster. Not with --eval."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="Fail (exit 1) if the 95 % interval of agreement begins below, 0 to 1.",
        show_default=False,
    ),
]
MinAccuracy = Annotated[
    float | None,
    typer.Option(
        help="Fail (exit 1) if the 95 % interval of top-1 begins below, 0 to 1.",
        show_default=False,
    ),
]
Eval = Annotated[
    str | None,
    typer.Option(
        help="Image folder, with labels as class folders, or .npz, or 'demo'.", show_default=False
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        help="Indices of class folders: .txt, a name a line, or .json, {name: index}.",
        show_default=False,
    ),
]


def floats(text: str | None, flag: str, example: str = "0.5,0.5,0.5") -> list[float] | None:
    """Numbers with commas between them; raises :class:`SettingError` for other text."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingError(
            f"{flag} is {text!r}; give numbers with commas, such as {example}."
        ) from None


def counts(text: str, flag: str, example: str) -> list[int]:
    """Whole numbers with commas between them; raises :class:`SettingError` for other text."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingError(f"{flag} is {text!r}; give whole numbers, such as {example}.") from None


def sides(text: str | None) -> int | list[int] | None:
    """An image size: one side, or height and width."""
    if text is None:
        return None
    sides = counts(text, "--img-size", "224 or 192,256")
    return sides[0] if len(sides) == 1 else sides
