"""Conversion of timm's vision transformers to :class:`dfq.vit.ViT`, verified on their outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.errors import WeightsError
from dfq.failures import explained, first_line
from dfq.sparse import patchify
from dfq.vit.architecture import Architecture
from dfq.vit.describe import describe
from dfq.vit.modules import ViT
from dfq.vit.structure import check_tensors, float_copy, unsupported
from dfq.vit.transfer import transfer

TOLERANCE = 1e-3
"""Largest accepted difference from timm's float32 values, relative to their largest magnitude."""

TINY = torch.finfo(torch.float32).tiny


def convert(model: nn.Module, name: str) -> ViT:
    """Copy a timm model's weights into a float32 :class:`ViT` in eval mode.

    The model is not modified.  The outputs of all blocks are compared in float32 on two random
    images, so that an unknown variant is refused instead of being converted wrongly.

    Raises:
        UnsupportedModelError: the model is not a patch ViT that dfq knows.
        WeightsError: a weight is NaN, infinite, without values or no floating-point number.
    """
    arch = describe(model, name)
    check_tensors(model, name)
    check_finite(dict(model.named_parameters()))
    plain = float_copy(model, name)
    with torch.device("meta"):
        vit = ViT(arch)
    vit.to_empty(device="cpu")
    transfer(plain, vit)
    vit.eval().requires_grad_(False)
    _compare(plain, vit, name)
    return vit


@torch.no_grad()
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
    """Compare the outputs of every block, of the last norm and of the model."""
    images = probe_images(vit.arch)
    failing = explained(lambda e: unsupported(name, f"its forward fails: {first_line(e)}"))
    with failing, torch.inference_mode():
        theirs = _intermediate_outputs(model, lambda: model(images))
    patches = patchify(images, vit.arch.grid)
    with torch.inference_mode():
        ours = _intermediate_outputs(vit, lambda: vit.classify(vit.tokens(patches)))
    for stage, expected in theirs.items():
        error = ours[stage] - expected
        worst = float(error.abs().max() / expected.abs().max().clamp_min(TINY))
        if not worst <= TOLERANCE:
            raise unsupported(
                name,
                f"{stage} differs from what its parts compute, by {worst:.2g} of the largest value",
            )


def probe_images(arch: Architecture) -> Tensor:
    """Return two normalized test images ``[2, C, H, W]``: Gaussian noise and a smooth image."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, arch.in_channels, *arch.image_size, generator=generator)
    coarse = torch.randn(1, arch.in_channels, 3, 3, generator=generator)
    smooth = F.interpolate(coarse, arch.image_size, mode="bilinear", align_corners=True)
    return torch.cat([noise, smooth])


def _intermediate_outputs(model: Any, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Run a model and return its output and those of its blocks and last norm, by description."""
    outputs: dict[str, Tensor] = {}
    modules = {f"the output of block {i}": block for i, block in enumerate(model.blocks)}
    modules["the output of its last norm"] = model.norm

    def keep(stage: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[stage] = output

    handles = [m.register_forward_hook(partial(keep, s)) for s, m in modules.items()]
    try:
        outputs["its output"] = run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs
