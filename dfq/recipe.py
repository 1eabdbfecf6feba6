"""Settings as frozen values, and recipes: settings in TOML files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from dfq.argument_names import parameter_names
from dfq.arguments import checked
from dfq.errors import RecipeError, SettingError, nearest
from dfq.inversion.losses import LOSSES
from dfq.inversion.schedules import METHODS
from dfq.inversion.schedules.method import Importance, LeaveFirst
from dfq.recipe_files import read_toml
from dfq.validation import FROM_COMPONENT, OneOf, Shares, describe, settings, with_component_fields

Precision = Literal["auto", "float32", "bfloat16"]
Products = Literal[Precision, "int8", "int7"]
Start = Literal["auto", "teacher", "random"]
Observer = Literal["minmax", "moving_average", "histogram", "percentile", "mse"]
Rounding = Literal["nearest", "gptq"]
AttentionMode = Literal["float", "int8"]
Activations = Literal["asymmetric", "symmetric"]


Divisors = Annotated[tuple[Annotated[float, Field(ge=1.0, le=1024.0)], ...], Strict(False)]
Classes = Annotated[tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...], Strict(False)]


@settings
@with_component_fields([*METHODS.items(), *(("", loss) for loss in LOSSES.values())])
class InversionSettings:
    """Settings of inversion.  Bounds are checked on construction.

    Fields of a method or a loss are declared by it, in :mod:`dfq.inversion.schedules` and
    :mod:`dfq.inversion.losses`.

    Raises:
        SettingError: a value is out of its range.
    """

    method: Annotated[str, OneOf(METHODS)] = Field(
        default="pri",
        description="; ".join(f"{name}: {kind.summary}" for name, kind in METHODS.items()),
    )
    images: int = Field(
        default=32, ge=1, le=10_000_000, description="number of images (pri: sparse images)"
    )
    stages: int = FROM_COMPONENT
    iterations: int = Field(
        default=48, ge=1, le=1_000_000, description="iterations T of a trajectory"
    )
    lr: float = Field(
        default=0.25, ge=1e-6, le=100.0, description="step size of Adam, in normalized pixels"
    )
    beta1: float = Field(default=0.5, ge=0.0, le=0.9999, description="decay of Adam's first moment")
    beta2: float = Field(
        default=0.99, ge=0.0, le=0.9999, description="decay of Adam's second moment"
    )
    tv: float = FROM_COMPONENT
    jitter: float = Field(
        default=0.125,
        ge=0.0,
        le=0.5,
        description="largest random roll, a share of the grid's side, rounded down to patches",
    )
    flip: bool = Field(default=True, description="flip half of the iterations horizontally")
    importance: Importance = Field(
        default="auto",
        description=(
            "measure that ranks patches; auto: attention of the class token or the pooling query, "
            "random where neither exists"
        ),
    )
    leave_first: LeaveFirst = FROM_COMPONENT
    leave_at: Shares = FROM_COMPONENT
    snapshots: int = FROM_COMPONENT
    plateau: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description=(
            "end a stage early once the unit's loss has not fallen from one window of this many "
            "iterations to the next; 0: never"
        ),
    )
    prune_at: Shares = FROM_COMPONENT
    prune_share: float = FROM_COMPONENT
    classes: Classes = Field(default=(), description="target classes, in turn; empty: all")
    unit_size: int = Field(
        default=4, ge=1, le=4096, description="trajectories that are optimized together"
    )
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="seed of noise, targets and jitter"
    )
    precision: Products = Field(
        default="auto",
        description=(
            "precision of the forward and backward pass; auto: bfloat16 where native, else "
            "float32; int8: linear layers on 8-bit integers, the rest in "
            "bfloat16 where native; int7: the same with 7-bit weights, the rest in float32"
        ),
    )
    threads: int | None = Field(
        default=None, ge=1, le=4096, description="CPU threads; by default PyTorch's number"
    )

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise SettingError(f"classes is {self.classes!r}; allowed: each class once.")


@settings
class LayerSettings:
    """Exception for some layers; fields left out are those of the other layers.

    Raises:
        SettingError: a value is out of its range.
    """

    bits: int | None = Field(default=None, ge=2, le=8, description="bits of the weights")
    input_bits: int | None = Field(default=None, ge=4, le=8, description="bits of the input")
    group: int | None = Field(
        default=None, ge=0, le=1 << 20, description="inputs that share an integer scale; 0: none"
    )
    rounding: Rounding | None = Field(default=None, description="nearest or gptq")
    observer: Observer | None = Field(default=None, description="observer of the input's range")

    def over(self, other: LayerSettings) -> LayerSettings:
        """Return these settings, completed by those of ``other``."""
        explicit = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(other, **explicit)


PATTERN = "pattern"
"""Key of the pattern of an exception in JSON."""


class LayerTable(dict[str, LayerSettings]):
    """Exceptions by name of layer, compared with their order; hashable."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and [*self.items()] == [*other.items()]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _layers(value: Any) -> Any:
    """Convert exceptions to :class:`LayerSettings`, from tables of TOML or an array of JSON."""
    if isinstance(value, list):
        value = _by_pattern(value)
    if not isinstance(value, dict):
        return value
    layers: dict[Any, Any] = {}
    for pattern, entry in value.items():
        try:
            layers[pattern] = LayerSettings(**entry) if isinstance(entry, dict) else entry
        except SettingError as error:
            raise SettingError(f"layers.{pattern!r}: {error}") from error
    return layers


def _by_pattern(entries: list[Any]) -> dict[str, Any]:
    """Convert an array of exceptions to a dict in the same order."""
    made: dict[str, Any] = {}
    for entry in entries:
        pattern = entry.get(PATTERN) if isinstance(entry, dict) else None
        if not isinstance(pattern, str) or pattern in made:
            raise SettingError(
                f"layers has the entry {entry!r:.60}; allowed: objects with a {PATTERN!r} of their "
                "own, which is text, beside the settings of its layers."
            )
        made[pattern] = {key: item for key, item in entry.items() if key != PATTERN}
    return made


@settings
class QuantizationSettings:
    """Settings of quantization.  Bounds are checked on construction.

    Raises:
        SettingError: a value is out of its range.
    """

    bits: int = Field(
        default=8, ge=2, le=8, description="bits of the weights; the first and last layer have 8"
    )
    input_bits: int = Field(
        default=8, ge=4, le=8, description="bits of the inputs of layers; as with bits"
    )
    activations: Activations = Field(
        default="asymmetric",
        description=(
            "inputs of layers; asymmetric: unsigned integers with a zero point; symmetric: signed "
            "ones with zero point 0, as TensorRT requires"
        ),
    )
    attention: AttentionMode = Field(
        default="float",
        description="float: fused attention; int8: both attention products on 8-bit integers",
    )
    observer: Observer = Field(
        default="minmax",
        description=("observer of activation ranges; equalized layers always use minmax"),
    )
    equalize: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description=(
            "bring channels that one layer alone reads to more equal ranges: 1 to their own range "
            "each (arXiv 2212.08254), less leaves room beyond it, 0 leaves them as they are"
        ),
    )
    rounding: Rounding = Field(
        default="gptq",
        description="nearest; gptq: second-order rounding of 4-bit weights (arXiv 2210.17323)",
    )
    group: int = Field(
        default=32,
        ge=0,
        le=1 << 20,
        description=(
            "inputs of 4-bit weights that share an integer scale within their channel (arXiv "
            "2405.04532); 0: one scale per output channel"
        ),
    )
    reduce_range: bool = Field(
        default=True,
        description=(
            "keep weights within -64..63 (8-bit ones to 7 bits, scales of groups to 8), so that no "
            "x86 processor and no runtime saturates; false: the full range, for processors with "
            "VNNI"
        ),
    )
    bias_correction: bool = Field(
        default=True,
        description="shift biases by the mean error of the rounded weights (arXiv 1906.04721, 4.2)",
    )
    damping: float = Field(
        default=0.1,
        ge=1e-6,
        le=1e3,
        description="gptq: added to the Hessian's diagonal, as a share of its mean",
    )
    smooth: Divisors = Field(
        default=(4.0, 8.0),
        description=(
            "divisors of the resolution of low-resolution copies of inverted images and fractal "
            "noise to calibrate on; empty: none"
        ),
    )
    fractal: int = Field(
        default=16,
        ge=0,
        le=4096,
        description="number of images of fractal noise to calibrate on, besides inverted ones",
    )
    reconstruct: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description=(
            "steps that fit each block's scales, biases and norms to the float block (arXiv "
            "2102.05426), a quarter of the trajectories held out; 0: none"
        ),
    )
    batch: int = Field(default=8, ge=1, le=4096, description="batch size of calibration")
    layers: Annotated[
        dict[str, LayerSettings], BeforeValidator(_layers), AfterValidator(LayerTable)
    ] = Field(
        default_factory=LayerTable,
        description="exceptions by name of layer, such as blocks.*.mlp.fc2 (* is any text)",
    )


@settings
class DistillationSettings:
    """Settings of distillation.  Bounds are checked on construction.

    Raises:
        SettingError: a value is out of its range.
    """

    steps: int = Field(default=2000, ge=1, le=10_000_000, description="training steps")
    batch: int = Field(default=64, ge=1, le=65536, description="largest batch size of training")
    start: Start = Field(
        default="auto",
        description=(
            "initialization of the student: random, or teacher, from evenly spaced blocks; auto: "
            "teacher if the blocks fit and the student has fewer"
        ),
    )
    lr: float = Field(default=5e-4, ge=1e-9, le=10.0, description="peak learning rate of AdamW")
    weight_decay: float = Field(
        default=0.05, ge=0.0, le=10.0, description="weight decay of matrices, in AdamW"
    )
    warmup: float = Field(
        default=0.1, ge=0.0, le=1.0, description="share of the steps with linear warm-up"
    )
    clip: float = Field(default=1.0, ge=1e-6, le=1e6, description="largest norm of the gradient")
    temperature: float = Field(
        default=2.0,
        ge=0.01,
        le=1000.0,
        description="temperature of both predictions (arXiv 1503.02531, section 2)",
    )
    jitter: float = Field(
        default=0.125,
        ge=0.0,
        le=0.5,
        description="largest random roll, a share of the grid's side, rounded down to patches",
    )
    flip: bool = Field(default=True, description="flip half of the batches horizontally")
    contrast: float = Field(
        default=4.0,
        ge=1.0,
        le=64.0,
        description=(
            "largest factor by which each image's contrast is raised or lowered, about a random "
            "level; 1: unchanged"
        ),
    )
    features: float = Field(
        default=1.0,
        ge=0.0,
        le=1e6,
        description=(
            "weight of the distance of the last patch tokens from the teacher's, where both have "
            "the same width"
        ),
    )
    smooth: Divisors = Field(
        default=(1.0, 2.0, 4.0),
        description=(
            "divisors of the resolution of low-resolution copies of inverted images and fractal "
            "noise to train on; empty: none"
        ),
    )
    fractal: int = Field(
        default=128,
        ge=0,
        le=65536,
        description="number of images of fractal noise to train on, besides inverted ones",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**31 - 1,
        description="seed of the student's weights, of batches and jitter",
    )
    precision: Precision = Field(
        default="auto",
        description=(
            "precision of the forward and backward pass; auto: bfloat16 if the processor is faster"
        ),
    )


@dataclass(frozen=True)
class Recipe:
    """Settings that determine a checkpoint, given the model.

    Only ``dfq distill`` reads ``distillation``.
    """

    inversion: InversionSettings = InversionSettings()
    quantization: QuantizationSettings = QuantizationSettings()
    distillation: DistillationSettings | None = None


LAYERS = "layers"
"""Tables of a recipe with exceptions by layer: ``[layers."blocks.*.mlp.fc2"]``."""

UNWRITTEN_DEFAULTS = {"activations"}
"""Settings that are written only where they are not the default: a recipe without them has the
bytes, and a checkpoint the format version, that it had before there were these settings."""

SECTIONS: dict[str, type[Any]] = {
    "inversion": InversionSettings,
    "quantization": QuantizationSettings,
    "distillation": DistillationSettings,
}


@checked
def load_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe; fields left out keep their defaults.

    Args:
        path: a file; or the name of a recipe that ships with dfq, such as ``"w4a8"``: text without
            a dot and a separator (``dfq recipes`` lists them).

    Raises:
        RecipeError: there is no such recipe, it is not TOML, or has an unknown key.
        SettingError: a value is out of its range.
    """
    return recipe_from_dict(read_toml(path), f"Recipe {str(path)!r}")


def recipe_from_dict(content: Any, source: str = "Recipe") -> Recipe:
    """Build a recipe from nested dicts, as TOML and JSON have them."""
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: expected tables {sorted(SECTIONS)}, got {content!r:.60}.")
    parts: dict[str, Any] = {}
    if isinstance(layers := content.get(LAYERS), dict) and layers:
        quantization = content.get("quantization", {})
        if isinstance(quantization, dict):
            content = {**content, "quantization": {**quantization, LAYERS: layers}}
    for section, values in content.items():
        if section == LAYERS:
            if not isinstance(values, dict):
                raise RecipeError(f"{source}: [{LAYERS}] holds tables, got {values!r:.60}.")
            continue
        if section not in SECTIONS:
            tables = [
                f"[{name}]"
                for name, kind in SECTIONS.items()
                if section in (f.name for f in dataclasses.fields(kind))
            ]
            hint = f" It belongs under {' or '.join(tables)}." if tables else ""
            raise RecipeError(
                f"{source}: unknown key {section!r}; tables are {sorted([*SECTIONS, LAYERS])}."
                f"{hint or nearest(section, [*SECTIONS, LAYERS])}"
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
    try:
        with parameter_names():
            return kind(**values)
    except SettingError as error:
        raise SettingError(f"{source}, [{section}]: {error}") from error


def override(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """Return the recipe with the values that are not None in one of its sections."""
    overrides = {k: v for k, v in values.items() if v is not None}
    before = getattr(recipe, section) or SECTIONS[section]()
    fields = {name: getattr(before, name) for name in describe(SECTIONS[section])}
    changed = SECTIONS[section](**{**fields, **overrides})
    return dataclasses.replace(recipe, **{section: changed})


def make_recipe(
    recipe: str | Path | Recipe | None,
    *,
    inversion: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
) -> Recipe:
    """Return a recipe (a file, a name, a value or the defaults) with settings overridden.

    Raises:
        RecipeError: the file is missing or malformed.
        SettingError: a value is out of its range.
    """
    if recipe is None:
        recipe = Recipe()
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = override(recipe, "inversion", **(inversion or {}))
    recipe = override(recipe, "quantization", **(quantization or {}))
    return override(recipe, "distillation", **distillation) if distillation else recipe


def sets_field(recipe: str | Path | Recipe | None, name: str) -> bool:
    """Whether a recipe sets a field of its inversion settings; a :class:`Recipe` sets all of them.

    Raises:
        RecipeError: the file cannot be read.
    """
    if recipe is None or isinstance(recipe, Recipe):
        return recipe is not None
    inversion = read_toml(recipe).get("inversion")
    return isinstance(inversion, dict) and name in inversion


def is_set(name: str, argument: Any, settings: dict[str, Any] | None, recipe: Any) -> bool:
    """Whether a call, its settings of the inversion or its recipe set a field of the inversion.

    Raises:
        RecipeError: the recipe's file cannot be read.
    """
    return argument is not None or name in (settings or {}) or sets_field(recipe, name)


def merge_arguments(settings: dict[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    """Return settings, overridden by the arguments that are not None."""
    return {**(settings or {}), **{k: v for k, v in arguments.items() if v is not None}}


def to_dict(value: Any) -> dict[str, Any]:
    """Convert settings to nested dicts of JSON types; fields that are None are left out, and
    :data:`UNWRITTEN_DEFAULTS`.

    Exceptions by layer become an array, as their order matters.
    """
    result: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if f.name in UNWRITTEN_DEFAULTS and item == describe(type(value))[f.name].default:
            continue
        if dataclasses.is_dataclass(item):
            result[f.name] = to_dict(item)
        elif isinstance(item, dict):
            if item:
                result[f.name] = [{PATTERN: key, **to_dict(value)} for key, value in item.items()]
        elif item is not None:
            result[f.name] = list(item) if isinstance(item, tuple) else item
    return result


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML, with the description of every field as a comment."""
    lines: list[str] = []
    for section, kind in SECTIONS.items():
        chosen = getattr(recipe, section)
        if chosen is None:
            continue
        lines.append(f"[{section}]")
        for name, info in describe(kind).items():
            value = getattr(chosen, name)
            if name == LAYERS or (name in UNWRITTEN_DEFAULTS and value == info.default):
                continue
            if value is None:
                lines.append(f"# {name} =  # {info.description}")
            else:
                lines.append(f"{name} = {_toml_value(value)}  # {info.description}")
        lines.append("")
    for pattern, exception in recipe.quantization.layers.items():
        lines.append(f"[{LAYERS}.{_toml_key(pattern)}]")
        lines += [f"{k} = {_toml_value(v)}" for k, v in to_dict(exception).items()]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _toml_key(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
