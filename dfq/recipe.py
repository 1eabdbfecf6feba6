"""Settings as frozen values, and recipes: the same settings as a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from dfq.arguments import checked
from dfq.errors import RecipeError, SettingError, nearest

Method = Literal["pri", "smi", "dmi", "noise"]
METHODS: tuple[str, ...] = get_args(Method)
Importance = Literal["auto", "attention", "gradient", "activation", "random"]
Precision = Literal["auto", "float32", "bfloat16"]
Products = Literal[Precision, "int8"]
Start = Literal["auto", "teacher", "random"]
LeaveFirst = Literal["most", "least"]
Observer = Literal["minmax", "moving_average", "histogram", "percentile", "mse"]
Rounding = Literal["nearest", "gptq"]
AttentionMode = Literal["float", "int8"]


def _setting(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """A documented field; ``low`` and ``high`` are the inclusive bounds of numbers."""
    return field(default=default, metadata={"doc": text, "low": low, "high": high})


@dataclass(frozen=True)
class InversionSettings:
    """How synthetic images are made.  Bounds are checked on construction.

    Raises:
        SettingError: a value is out of its range.
    """

    method: Method = _setting(
        "pri",
        "pri: Patch Rebirth Inversion; smi: sparse, discarding; dmi: dense; noise: no optimisation",
    )
    images: int = _setting(32, "images to make (pri: sparse images)", 1, 10_000_000)
    stages: int = _setting(4, "pri: images a trajectory yields, v of the paper", 1, 1024)
    iterations: int = _setting(48, "iterations T of a trajectory", 1, 1_000_000)
    lr: float = _setting(0.25, "step size of Adam, in normalised pixels", 1e-6, 100.0)
    beta1: float = _setting(0.5, "decay of Adam's first moment", 0.0, 0.9999)
    beta2: float = _setting(0.99, "decay of Adam's second moment", 0.0, 0.9999)
    tv: float = _setting(5.7e-4, "weight of each image's total variation", 0.0, 1e6)
    jitter: float = _setting(
        0.125,
        "largest random roll, a share of the grid's side, rounded down to patches",
        0.0,
        0.5,
    )
    flip: bool = _setting(True, "flip half of the iterations horizontally")
    importance: Importance = _setting(
        "auto",
        "which patches leave first; auto: attention of the class token or the pooling query, "
        "random where neither exists",
    )
    leave_first: LeaveFirst = _setting(
        "most", "pri: whether the most or the least important patches leave first"
    )
    leave_at: tuple[float, ...] = _setting(
        (),
        "pri: when images leave, as shares of T, rising, all but the last; empty: at equal steps",
        0.0,
        1.0,
    )
    snapshots: int = _setting(
        1, "dmi: dense images saved of a trajectory, at equal steps up to T", 1, 1024
    )
    plateau: int = _setting(
        0,
        "end a stage early once the unit's loss has not fallen from one window of this many "
        "iterations to the next; 0: never",
        0,
        1_000_000,
    )
    prune_at: tuple[float, ...] = _setting(
        (0.0125, 0.025, 0.05, 0.075), "smi: when patches are dropped, as shares of T", 0.0, 1.0
    )
    prune_share: float = _setting(
        0.3, "smi: share of the live patches dropped each time", 0.0, 0.99
    )
    classes: tuple[int, ...] = _setting(
        (), "classes to make images of, in turn; empty: all", 0, 1_000_000
    )
    unit_size: int = _setting(4, "trajectories of a unit of work", 1, 4096)
    seed: int = _setting(0, "seed of noise, targets and jitter", 0, 2**31 - 1)
    precision: Products = _setting(
        "auto",
        "of the forward and backward pass; auto: bfloat16 where the processor is faster; int8: "
        "linear layers on 8-bit integers, the rest as auto",
    )
    threads: int | None = _setting(None, "threads of a unit; left out: torch's", 1, 4096)

    def __post_init__(self) -> None:
        check_bounds(self)
        if len(set(self.classes)) < len(self.classes):
            raise SettingError(f"classes is {self.classes!r}; allowed: each class once.")


@dataclass(frozen=True)
class QuantizationSettings:
    """What is quantized to what.  Bounds are checked on construction.

    Raises:
        SettingError: a value is out of its range.
    """

    bits: Literal[4, 8] = _setting(8, "bits of the weights; activations have 8")
    attention: AttentionMode = _setting(
        "float", "float: fused attention; int8: both attention products on 8-bit integers"
    )
    observer: Observer = _setting(
        "minmax",
        "how activation ranges follow from calibration; equalised layers always take minmax",
    )
    equalize: float = _setting(
        0.5,
        "bring channels that one layer alone reads to more equal ranges: 1 to their own range each "
        "(arXiv 2212.08254), less leaves room beyond it, 0 leaves them as they are",
        0.0,
        1.0,
    )
    rounding: Rounding = _setting(
        "gptq", "nearest; gptq: second-order rounding of 4-bit weights (arXiv 2210.17323)"
    )
    group: int = _setting(
        32,
        "inputs of 4-bit weights that share an integer scale within their channel "
        "(arXiv 2405.04532); 0: one scale per output channel",
        0,
        1 << 20,
    )
    reduce_range: bool = _setting(
        True,
        "keep weights within -64..63 (8-bit ones to 7 bits, scales of groups to 8), so that no x86 "
        "processor and no runtime saturates; false: the full range, for processors with VNNI",
    )
    bias_correction: bool = _setting(
        True, "shift biases by the mean error of the rounded weights (arXiv 1906.04721, 4.2)"
    )
    damping: float = _setting(
        0.1, "gptq: added to the Hessian's diagonal, as a share of its mean", 1e-6, 1e3
    )
    smooth: tuple[float, ...] = _setting(
        (4.0, 8.0),
        "calibrate on inverted images at these shares of their resolution too, as divisors",
        1.0,
        1024.0,
    )
    fractal: int = _setting(
        16, "images of noise with a natural spectrum to calibrate on beside inverted ones", 0, 4096
    )
    reconstruct: int = _setting(
        0,
        "steps that fit each block's scales, biases and norms to the float block (arXiv "
        "2102.05426), a quarter of the trajectories held out; 0: none",
        0,
        1_000_000,
    )
    batch: int = _setting(8, "images of a calibration step", 1, 4096)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class DistillationSettings:
    """How a student is trained on a teacher's images.  Bounds are checked on construction.

    Raises:
        SettingError: a value is out of its range.
    """

    steps: int = _setting(2000, "steps of training", 1, 10_000_000)
    batch: int = _setting(64, "images of a step, at most", 1, 65536)
    start: Start = _setting(
        "auto",
        "weights the student begins with: random, or of as many of the teacher's blocks; auto: the "
        "teacher's where they fit and are fewer",
    )
    lr: float = _setting(5e-4, "largest step size of AdamW", 1e-9, 10.0)
    weight_decay: float = _setting(0.05, "of matrices, by AdamW", 0.0, 10.0)
    warmup: float = _setting(0.1, "share of the steps over which the step size grows", 0.0, 1.0)
    clip: float = _setting(1.0, "largest norm of the gradient", 1e-6, 1e6)
    temperature: float = _setting(
        2.0, "of teacher's and student's predictions (arXiv 1503.02531, section 2)", 0.01, 1000.0
    )
    jitter: float = _setting(
        0.125, "largest random roll, a share of the grid's side, rounded down to patches", 0.0, 0.5
    )
    flip: bool = _setting(True, "flip half of the batches horizontally")
    contrast: float = _setting(
        4.0,
        "each image's contrast is multiplied by up to so much, or divided, about a random level; "
        "1: left as it is",
        1.0,
        64.0,
    )
    features: float = _setting(
        1.0,
        "weight of the distance of the last patch tokens from the teacher's, where both have the "
        "same width",
        0.0,
        1e6,
    )
    smooth: tuple[float, ...] = _setting(
        (1.0, 2.0, 4.0),
        "train on whole inverted images and fractal noise at these shares of their resolution too, "
        "as divisors",
        1.0,
        1024.0,
    )
    fractal: int = _setting(
        128, "images of noise with a natural spectrum to train on beside inverted ones", 0, 65536
    )
    seed: int = _setting(0, "seed of the student's weights, of batches and jitter", 0, 2**31 - 1)
    precision: Precision = _setting(
        "auto", "of the forward and backward pass; auto: bfloat16 where the processor is faster"
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a checkpoint holds, given the model.

    ``distillation`` is that of a recipe for ``dfq distill``; nothing else reads it.
    """

    inversion: InversionSettings = field(default_factory=InversionSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    distillation: DistillationSettings | None = None


SECTIONS: dict[str, type[Any]] = {
    "inversion": InversionSettings,
    "quantization": QuantizationSettings,
    "distillation": DistillationSettings,
}


def check_bounds(settings: Any) -> None:
    """Raise :class:`SettingError` if a field has the wrong type or is out of its range."""
    hints = get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value, doc = getattr(settings, f.name), f.metadata
        allowed = _allowed(value, hints[f.name], doc)
        if allowed is not None:
            raise SettingError(
                f"{f.name} is {value!r}; allowed: {allowed}{'' if allowed.endswith('?') else '.'}"
            )


def _allowed(value: Any, hint: Any, doc: Any) -> str | None:
    """What is allowed, if ``value`` is not."""
    low, high = doc["low"], doc["high"]
    span = f"{low} to {high}"
    choices = get_args(hint)
    if choices and all(isinstance(c, str | int) and not isinstance(c, type) for c in choices):
        known = ", ".join(map(str, choices))
        if isinstance(value, str):
            known += f".{nearest(value, map(str, choices))}".removesuffix(".")
        good = any(value == c and type(value) is type(c) for c in choices)
        return None if good else known
    if hint is bool:
        return None if isinstance(value, bool) else "true or false"
    if hint is int or hint == (int | None):
        if value is None and hint is not int:
            return None
        good = type(value) is int and low <= value <= high
        return None if good else f"a whole number from {span}"
    if hint is float:
        good = type(value) in (int, float) and low <= value <= high
        return None if good else f"a number from {span}"
    whole = hint == tuple[int, ...]
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, tuple) and all(type(v) in kinds and low <= v <= high for v in value)
    return None if good else f"{'whole ' if whole else ''}numbers from {span}"


@checked
def load_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe; fields left out keep their defaults.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown key.
        SettingError: a value is out of its range.
    """
    return recipe_from_dict(_read_toml(path), f"Recipe {str(path)!r}")


def _read_toml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"Recipe {str(path)!r} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {str(path)!r} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"Recipe {str(path)!r} is not valid TOML: {error}.") from error


def recipe_from_dict(content: Any, source: str = "Recipe") -> Recipe:
    """Build a recipe from nested dicts, as TOML and JSON have them."""
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: expected tables {sorted(SECTIONS)}, got {content!r:.60}.")
    parts: dict[str, Any] = {}
    for section, values in content.items():
        if section not in SECTIONS:
            homes = [
                f"[{name}]"
                for name, kind in SECTIONS.items()
                if section in (f.name for f in dataclasses.fields(kind))
            ]
            hint = f" It belongs under {' or '.join(homes)}." if homes else ""
            raise RecipeError(
                f"{source}: unknown key {section!r}; tables are {sorted(SECTIONS)}."
                f"{hint or nearest(section, SECTIONS)}"
            )
        if not isinstance(values, dict):
            raise RecipeError(f"{source}: [{section}] must be a table, got {values!r:.60}.")
        parts[section] = _section(section, values, source)
    return Recipe(**parts)


def _section(section: str, values: dict[str, Any], source: str) -> Any:
    kind = SECTIONS[section]
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise RecipeError(
                f"{source}: unknown key {key!r} in [{section}]; known: {', '.join(known)}."
                f"{nearest(key, known)}"
            )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except SettingError as error:
        raise SettingError(f"{source}, [{section}]: {error}") from error


def override(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """The recipe with the values that are not None put in place of its own."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}
    known = [f.name for f in dataclasses.fields(SECTIONS[section])]
    for key in given:
        if key not in known:
            raise SettingError(
                f"Unknown setting {key!r}; known: {', '.join(known)}.{nearest(key, known)}"
            )
    before = getattr(recipe, section) or SECTIONS[section]()
    changed = dataclasses.replace(before, **given)
    return dataclasses.replace(recipe, **{section: changed})


def make_recipe(
    recipe: str | Path | Recipe | None,
    *,
    inversion: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe (a file, a value or the defaults) with single settings overridden.

    Raises:
        RecipeError, SettingError: as their names say.
    """
    if recipe is None:
        recipe = Recipe()
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = override(recipe, "inversion", **(inversion or {}))
    recipe = override(recipe, "quantization", **(quantization or {}))
    return override(recipe, "distillation", **distillation) if distillation else recipe


def says(recipe: str | Path | Recipe | None, name: str) -> bool:
    """Whether a recipe sets a field of its inversion; a :class:`Recipe` sets all of them.

    Raises:
        RecipeError: the file cannot be read.
    """
    if recipe is None or isinstance(recipe, Recipe):
        return recipe is not None
    inversion = _read_toml(recipe).get("inversion")
    return isinstance(inversion, dict) and name in inversion


def is_set(name: str, argument: Any, settings: dict[str, Any] | None, recipe: Any) -> bool:
    """Whether a call, its settings of the inversion or its recipe set a field of the inversion.

    Raises:
        RecipeError: the recipe's file cannot be read.
    """
    return argument is not None or name in (settings or {}) or says(recipe, name)


def given(settings: dict[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    """Settings with the arguments that the caller gave put over them."""
    return {**(settings or {}), **{k: v for k, v in arguments.items() if v is not None}}


def to_dict(value: Any) -> dict[str, Any]:
    """Nested dicts of JSON types; fields that are None are left out."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item):
            result[f.name] = to_dict(item)
        elif item is not None:
            result[f.name] = list(item) if isinstance(item, tuple) else item
    return result


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every field with a comment that says what it is."""
    lines: list[str] = []
    for section, kind in SECTIONS.items():
        settings = getattr(recipe, section)
        if settings is None:
            continue
        lines.append(f"[{section}]")
        for f in dataclasses.fields(kind):
            value = getattr(settings, f.name)
            doc = f.metadata["doc"]
            if value is None:
                lines.append(f"# {f.name} =  # {doc}")
            else:
                lines.append(f"{f.name} = {_toml_value(value)}  # {doc}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
