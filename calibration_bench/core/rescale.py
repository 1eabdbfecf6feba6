"""Rescaling of channels: the same function with channels of very different ranges.

In trained ViTs some channels after layer norms have a hundred times the range of others, which
makes ranges per tensor useless.  A model without such outliers gets them here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dfq.errors import DataError
from dfq.files import check_writable, write_bytes

PAIRS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
"""Layer norms of a block and the only layer that reads each, by timm's names."""

MOST = 100.0


def rescale(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Channels after each block's layer norms times 1/100 to 100, evenly in the logarithm, and
    the next layer's columns divided by the same, as float32.

    ``state`` is a timm ViT's state dict.

    Raises:
        DataError: it has no such blocks.
    """
    rescaled = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
    blocks = sorted({name.split(".")[1] for name in state if name.startswith("blocks.")}, key=int)
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for norm, layer in PAIRS:
            names = [f"blocks.{block}.{n}" for n in (f"{norm}.weight", f"{norm}.bias")]
            column = f"blocks.{block}.{layer}.weight"
            if any(name not in rescaled for name in (*names, column)):
                raise DataError(f"There is no {column!r} with a layer norm before it to rescale.")
            share = torch.rand(rescaled[column].shape[1], generator=generator)
            factor = MOST ** (2 * share - 1)
            for name in names:
                rescaled[name] = rescaled[name] * factor
            rescaled[column] = rescaled[column] / factor
    if not blocks:
        raise DataError("There are no blocks to rescale; it takes the weights of a timm ViT.")
    return rescaled


def rescale_file(source: Path, target: Path, seed: int) -> None:
    """Read weights from a safetensors file and write rescaled ones.

    Raises:
        DataError: they cannot be read, are no timm ViT's, or ``target`` exists.
    """
    if target.exists():
        raise DataError(f"{str(target)!r} exists; name another file.")
    check_writable(target.parent)
    try:
        state = load_file(source)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{str(source)!r} cannot be read as safetensors: {error}.") from error
    write_bytes(target, save(rescale(state, seed)))
