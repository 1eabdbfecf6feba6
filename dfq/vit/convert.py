"""timm's vision transformers -> :class:`dfq.vit.ViT`, checked by comparing their outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dfq.errors import WeightsError
from dfq.sparse import patchify
from dfq.vit.describe import describe, refusal
from dfq.vit.modules import ViT
from dfq.vit.transfer import transfer

TOLERANCE = 2e-3
"""Largest accepted difference of the logits from timm's, relative to their largest magnitude."""


def convert(model: nn.Module, name: str) -> ViT:
    """Copy a timm model's weights into a float32 :class:`ViT` in eval mode.

    The model is left as it is.  The copy is compared with it on one random image, so
    that a variant that dfq does not know is refused and never silently wrong.

    Raises:
        UnsupportedModelError: the model is not a patch ViT that dfq knows.
        WeightsError: a weight is NaN or infinite.
    """
    arch = describe(model, name)
    check_finite(model.state_dict())
    with torch.device("meta"):
        vit = ViT(arch)
    vit.to_empty(device="cpu")
    transfer(model, vit)
    vit.eval().requires_grad_(False)
    _compare(model, vit, name)
    return vit


def check_finite(state: dict[str, Any]) -> None:
    """Raise :class:`WeightsError` if a floating-point tensor holds NaN or infinity."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta":
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise WeightsError(
                    f"Weight {key!r} holds {bad} NaN or infinite values of {value.numel()}. "
                    "Use weights from a training run that did not diverge."
                )


def _compare(model: Any, vit: ViT, name: str) -> None:
    """Compare every token after the last norm, and the output, on one random image.

    Both in float32, whatever the model's type: in a narrower one the difference that an
    adapter makes would be lost in rounding.
    """
    generator = torch.Generator().manual_seed(0)
    arch = vit.arch
    image = torch.randn(1, arch.in_channels, *arch.image_size, generator=generator)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    tokens: list[Tensor] = []
    model.norm.register_forward_hook(lambda *given: tokens.append(given[-1]))
    with torch.inference_mode():
        theirs = model(image)
        ours = vit.tokens(patchify(image, arch.grid))
        pairs = [(vit.norm(ours), tokens[0]), (vit.classify(ours), theirs)]
    for found, expected in pairs:
        worst = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not worst <= TOLERANCE:
            raise refusal(name, f"its output differs from what its parts compute (by {worst:.2g})")
