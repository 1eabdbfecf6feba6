"""What a vision transformer is made of, as plain data."""

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
    """The shape of a :class:`dfq.vit.ViT`; enough to build one without weights.

    ``num_prefix_tokens`` counts the class token, the distillation token and the registers,
    which precede the patch tokens.  ``num_classes`` is 0 for a backbone without a classifier.
    Sizes are (height, width) in pixels.

    ``pool``: ``token`` the class token; ``distilled`` the first two tokens, one after the other
    (their mean without a classifier); ``avg`` the mean; ``map`` attention of one learnt query,
    with ``pool_heads`` heads and an MLP of ``pool_hidden`` (both 0 otherwise).  The last two
    leave the prefix tokens out unless ``pool_includes_prefix``.

    ``gated_mlp``: the first linear layer of the MLP gives a gate and a value, and ``mlp_hidden``
    is the width of either.  ``rope``: queries and keys of patches are rotated by position.
    ``relative_bias``: attention scores have a learnt bias by relative position.
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
        """How many of the first tokens are pooled; None if the others take part."""
        return {"token": 1, "distilled": 2}.get(self.pool)

    @property
    def head_inputs(self) -> int:
        """Width of what the classifier reads."""
        return (2 if self.pool == "distilled" else 1) * self.embed_dim

    @property
    def grid(self) -> Grid:
        return Grid(self.image_size, self.patch_size, self.in_channels)

    @property
    def attention_dim(self) -> int:
        return self.num_heads * self.head_dim


PIXEL_RANGE = (0.0, 1.0)
"""Input range of pixels / 255."""


@dataclass(frozen=True)
class Preprocessing:
    """How data become the network's input: ``(value - mean) / std`` per channel.

    ``input_range`` is the lowest and the highest value before normalisation, in the units of
    ``mean`` and ``std``; by default the values are pixels / 255.  dfq works on 256 levels of it:
    level ``i`` stands for ``low + i / 255 * (high - low)``, of pixels for pixel ``i``.

    ``interpolation`` is a Pillow resampling name; ``crop_pct`` the share of the resized
    image's side that a centre crop keeps.  ``crop_mode`` is timm's: ``squash`` resizes
    both sides alike, the others keep their ratio.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    input_range: tuple[float, float] = field(default=PIXEL_RANGE, metadata={"optional": True})

    @property
    def level_mean(self) -> tuple[float, ...]:
        """The mean in units of levels / 255."""
        low, high = self.input_range
        return tuple((mean - low) / (high - low) for mean in self.mean)

    @property
    def level_std(self) -> tuple[float, ...]:
        """The standard deviation in units of levels / 255."""
        low, high = self.input_range
        return tuple(std / (high - low) for std in self.std)

    @property
    def of_pixels(self) -> bool:
        """Whether the 256 levels are those of 8-bit pixels."""
        return self.input_range in (PIXEL_RANGE, (0.0, 255.0))


def to_json(value: Architecture | Preprocessing) -> dict[str, Any]:
    """The JSON form of a description; the inverse of :func:`from_json`.

    Optional fields are left out where they have their default.
    """
    left_out = {
        f.name
        for f in dataclasses.fields(value)
        if f.metadata.get("optional") and getattr(value, f.name) == f.default
    }
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(value).items()
        if k not in left_out
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
    odd = sorted((set(fields) ^ set(known)) - (optional - set(fields)))
    if odd:
        raise CheckpointError(f"{kind.__name__}: missing or unknown fields {odd}.")
    return kind(**{name: _field(kind, name, known[name], v) for name, v in fields.items()})


def _field(kind: type[Any], name: str, type_name: str, value: Any) -> Any:
    good: bool
    if type_name == "bool":
        good = isinstance(value, bool)
    elif type_name == "int":
        good = type(value) is int and 0 <= value < _LIMIT
    elif type_name == "float":
        good = type(value) in (int, float) and 0 <= value < _LIMIT
        value = float(value) if good else value
    elif type_name == "tuple[int, int]":
        good = (
            isinstance(value, list)
            and len(value) == 2
            and all(type(v) is int and 0 < v < _LIMIT for v in value)
        )
        value = tuple(value) if good else value
    elif type_name in ("tuple[float, ...]", "tuple[float, float]"):
        good = (
            isinstance(value, list)
            and 0 < len(value) < 1024
            and (len(value) == 2 or type_name == "tuple[float, ...]")
            and all(type(v) in (int, float) and abs(v) <= LARGEST for v in value)
        )
        value = tuple(float(v) for v in value) if good else value
    else:
        choices = _CHOICES[type_name]
        good, type_name = value in choices, f"choice: {', '.join(choices)}"
    if not good:
        raise CheckpointError(
            f"{kind.__name__}.{name}: {value!r:.80} is not a valid {type_name.lower()}."
        )
    return value
