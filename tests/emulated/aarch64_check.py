"""Checkpoints of the demo and their logits, written here and compared on another processor."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

import dfq

SCHEMES = [(bits, attention) for bits in (8, 4) for attention in ("float", "int8")]
BOUND = 0.03
"""Largest relative difference of logits: float32 rounding outside the integer products moves some
activations by a level."""


def images() -> Tensor:
    """Sixteen normalized images of the demo's size."""
    return torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write(place: Path) -> None:
    """Quantize the demo in every scheme and keep the reference's logits."""
    for bits, attention in SCHEMES:
        out = place / f"w{bits}-{attention}"
        dfq.quantize(
            "demo", bits=bits, attention=attention, images=8, iterations=8, out=out, cache=place
        )
        model = dfq.load(out).set_backend("reference")
        torch.save(model(images()), place / f"{out.name}.pt")


def compare(place: Path) -> None:
    """Compare logits on this processor with those that were kept, then quantize here too."""
    print(platform.machine(), dfq.doctor().backend)
    for bits, attention in SCHEMES:
        name = f"w{bits}-{attention}"
        model = dfq.load(place / name)
        logits, expected = model(images()), torch.load(place / f"{name}.pt")
        difference = float((logits - expected).norm() / expected.norm())
        print(f"{name}: relative difference {difference:.1e} on {model.backend}")
        assert difference < BOUND
    made = dfq.quantize("demo", bits=4, images=4, iterations=4, out=place / "here", cache=place)
    print(f"quantized here: agreement {made.agreement:.2%}")


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
