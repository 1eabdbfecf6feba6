"""Architecture and preprocessing of a vision transformer, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dfq.errors import CheckpointError
from dfq.sparse import Grid

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Pool = Literal["token", "distilled", "avg", "map"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]


@dataclass(frozen=True)
class Architecture:
    """Architecture of a :class:`dfq.vit.ViT`; enough to build one without weights.

    ``num_prefix_tokens`` counts the class token, the distillation token and the registers,
    which precede the patch tokens.  ``num_classes`` is 0 for a backbone without a classifier.
    Sizes are (height, width) in pixels.

    ``pool``: ``token`` the class token; ``distilled`` the first two tokens, one after the other
    (their mean without a classifier); ``avg`` the mean; ``map`` attention of one learned query,
    with ``pool_heads`` heads and an MLP of ``pool_hidden`` (both 0 otherwise).  The last two
    exclude the prefix tokens unless ``pool_includes_prefix``.

    ``gated_mlp``: the first linear layer of the MLP outputs gates and values; ``mlp_hidden`` is
    the width of each.  ``rope``: queries and keys of patches are rotated by position.
    ``relative_bias``: attention scores have a learned bias by relative position.
    ``attn_norm`` and ``mlp_norm``: a norm before the last linear layer of each.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_channels: int
    embed_dim: int
    depth: int
    num_heads: int
    head_dim: int
    mlp_hidden: int
    num_classes: int
    num_prefix_tokens: int
    class_token: bool
    pool: Pool
    pool_includes_prefix: bool
    activation: Activation
    norm_eps: float
    qk_norm: bool
    patch_norm: bool
    pre_norm: bool
    final_norm: bool
    pooled_norm: bool
    gated_mlp: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    rope: bool = False
    relative_bias: bool = False
    pool_heads: int = 0
    pool_hidden: int = 0
    pool_activation: Activation = "gelu"

    @property
    def pooled_tokens(self) -> int | None:
        """Number of prefix tokens that are pooled; None if patches are pooled too."""
        return {"token": 1, "distilled": 2}.get(self.pool)

    @property
    def head_inputs(self) -> int:
        """Input width of the classifier."""
        return (2 if self.pool == "distilled" else 1) * self.embed_dim

    @property
    def grid(self) -> Grid:
        return Grid(self.image_size, self.patch_size, self.in_channels)

    @property
    def attention_dim(self) -> int:
        return self.num_heads * self.head_dim


PIXEL_RANGE = (0.0, 1.0)
"""Input range of pixels divided by 255."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images: ``(value - mean) / std`` per channel.

    ``input_range`` is the lowest and the highest value before normalization, in the units of
    ``mean`` and ``std``; by default the values are pixels / 255.  dfq quantizes it to 256 levels:
    level ``i`` represents ``low + i / 255 * (high - low)``; for pixels, levels are pixel values.

    ``interpolation`` is a Pillow resampling name; ``crop_pct`` the share of the resized
    image's side that a center crop keeps.  ``crop_mode`` is timm's: ``squash`` resizes
    both sides alike, the others keep the aspect ratio.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    input_range: tuple[float, float] = field(default=PIXEL_RANGE, metadata={"optional": True})

    @property
    def level_mean(self) -> tuple[float, ...]:
        """Mean in units of levels / 255."""
        low, high = self.input_range
        return tuple((mean - low) / (high - low) for mean in self.mean)

    @property
    def level_std(self) -> tuple[float, ...]:
        """Standard deviation in units of levels / 255."""
        low, high = self.input_range
        return tuple(std / (high - low) for std in self.std)

    @property
    def takes_pixels(self) -> bool:
        """Whether the 256 levels are those of 8-bit pixels."""
        return self.input_range in (PIXEL_RANGE, (0.0, 255.0))


def to_json(value: Architecture | Preprocessing) -> dict[str, Any]:
    """Convert to JSON types; the inverse of :func:`from_json`.

    Optional fields with their default value are omitted.
    """
    omitted = {
        f.name
        for f in dataclasses.fields(value)
        if f.metadata.get("optional") and getattr(value, f.name) == f.default
    }
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(value).items()
        if k not in omitted
    }


_CHOICES = {
    "Pool": get_args(Pool),
    "Activation": get_args(Activation),
    "Interpolation": get_args(Interpolation),
    "CropMode": get_args(CropMode),
}
_LIMIT = 1 << 20
LARGEST = 1e30
"""Largest magnitude of a number of the preprocessing."""


def from_json(kind: type[Any], fields: Any) -> Any:
    """Rebuild an :class:`Architecture` or :class:`Preprocessing` from its JSON form.

    Raises:
        CheckpointError: a field is missing, unknown, of the wrong type or out of range.
    """
    if not isinstance(fields, dict):
        raise CheckpointError(f"{kind.__name__}: expected a JSON object, got {fields!r:.80}.")
    known = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    optional = {f.name for f in dataclasses.fields(kind) if f.metadata.get("optional")}
    wrong = sorted((set(fields) ^ set(known)) - (optional - set(fields)))
    if wrong:
        raise CheckpointError(f"{kind.__name__}: missing or unknown fields {wrong}.")
    return kind(**{name: _field(kind, name, known[name], v) for name, v in fields.items()})


def _field(kind: type[Any], name: str, type_name: str, value: Any) -> Any:
    valid: bool
    if type_name == "bool":
        valid = isinstance(value, bool)
    elif type_name == "int":
        valid = type(value) is int and 0 <= value < _LIMIT
    elif type_name == "float":
        valid = type(value) in (int, float) and 0 <= value < _LIMIT
        value = float(value) if valid else value
    elif type_name == "tuple[int, int]":
        valid = (
            isinstance(value, list)
            and len(value) == 2
            and all(type(v) is int and 0 < v < _LIMIT for v in value)
        )
        value = tuple(value) if valid else value
    elif type_name in ("tuple[float, ...]", "tuple[float, float]"):
        valid = (
            isinstance(value, list)
            and 0 < len(value) < 1024
            and (len(value) == 2 or type_name == "tuple[float, ...]")
            and all(type(v) in (int, float) and abs(v) <= LARGEST for v in value)
        )
        value = tuple(float(v) for v in value) if valid else value
    else:
        choices = _CHOICES[type_name]
        valid, type_name = value in choices, f"choice: {', '.join(choices)}"
    if not valid:
        raise CheckpointError(
            f"{kind.__name__}.{name}: {value!r:.80} is not a valid {type_name.lower()}."
        )
    return value
