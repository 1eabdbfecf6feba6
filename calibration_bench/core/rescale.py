"""Weights that compute the same function through channels of very different size.

Trained ViTs have channels after layer norms a hundred times wider than others, and ranges per
tensor collapse on them.  A model without any is given some here.
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
"""Of timm's names in a block: a layer norm, and the only layer that reads it."""

MOST = 100.0


def rescale(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Channels after each block's layer norms times 1/100 to 100, evenly in the logarithm, and
    the next layer's columns divided by the same, as float32.

    ``state`` is a timm ViT's state dict.

    Raises:
        DataError: it has no such blocks.
    """
    found = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
    blocks = sorted({name.split(".")[1] for name in state if name.startswith("blocks.")}, key=int)
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for norm, layer in PAIRS:
            names = [f"blocks.{block}.{n}" for n in (f"{norm}.weight", f"{norm}.bias")]
            column = f"blocks.{block}.{layer}.weight"
            if any(name not in found for name in (*names, column)):
                raise DataError(f"There is no {column!r} with a layer norm before it to rescale.")
            share = torch.rand(found[column].shape[1], generator=generator)
            factor = MOST ** (2 * share - 1)
            for name in names:
                found[name] = found[name] * factor
            found[column] = found[column] / factor
    if not blocks:
        raise DataError("There are no blocks to rescale; it takes the weights of a timm ViT.")
    return found


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
