"""Weights of JAX's vision transformers (``.npz``), read by timm's own loader.

timm's loader silently resamples, adapts or skips tensors that do not fit.  Therefore the model is
built with the shapes of the file, and its state dict is then checked like that of any other file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dfq.errors import WeightsError
from dfq.failures import explained, first_line

PREFIXES = ("opt/target/", "params/img/", "params/", "")
BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")
STACKED_BLOCKS = "Transformer/encoderblock/LayerNorm_0/scale"
"""Present in files that stack all blocks along the first axis of one array."""

LAYER_BEFORE_HEAD = "pre_logits.fc.weight"


def read_jax(path: Path) -> dict[str, Tensor]:
    """Read a state dict under timm's names.

    Raises:
        WeightsError: the file is not a vision transformer that timm can read.
    """

    def explain(error: Exception) -> WeightsError:
        return WeightsError(
            f"{str(path)!r} is a NumPy archive that is not read as one of JAX's vision "
            f"transformers ({type(error).__name__}: {first_line(error)}). Give a file of PyTorch "
            "weights."
        )

    with explained(explain):
        with np.load(path, allow_pickle=False) as archive:
            prefix = _prefix(archive.files)
            if prefix is None:
                raise WeightsError(
                    f"{str(path)!r} is a NumPy archive without the names of JAX's vision "
                    "transformers, such as 'embedding/kernel'. Give a file of PyTorch weights."
                )
            names = {name.removeprefix(prefix) for name in archive.files}
            shape = _shape({name: archive[f"{prefix}{name}"] for name in names}, prefix)
        model = VisionTransformer(**shape)
        with torch.no_grad():
            model.load_pretrained(str(path))
    state = dict(model.state_dict())
    if "pre_logits/kernel" in names:
        state[LAYER_BEFORE_HEAD] = torch.ones(1)
    return state


def _prefix(names: list[str]) -> str | None:
    return next((p for p in PREFIXES if f"{p}embedding/kernel" in names), None)


def _shape(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Return the arguments of timm's model for arrays whose prefix has been removed."""
    height, width, channels, dim = arrays["embedding/kernel"].shape
    of_big_vision = (
        prefix.startswith("params/") or "pos_embedding" in arrays or STACKED_BLOCKS in arrays
    )
    table = "pos_embedding" if of_big_vision else "Transformer/posembed_input/pos_embedding"
    class_token, by_query = "cls" in arrays, "MAPHead_0/probe" in arrays
    patches = arrays[table].shape[1] - (class_token and not of_big_vision)
    blocks = {int(match[1]) for match in map(BLOCK.match, arrays) if match}
    hidden = next(a.shape[-1] for k, a in arrays.items() if k.endswith("Dense_0/bias"))
    head = arrays.get("head/bias")
    return {
        "img_size": (height * patches, width),
        "patch_size": (height, width),
        "in_chans": channels,
        "num_classes": 0 if head is None else len(head),
        "embed_dim": dim,
        "depth": len(arrays[STACKED_BLOCKS]) if STACKED_BLOCKS in arrays else len(blocks),
        "num_heads": 1,  # no weight has another shape with more
        "mlp_ratio": (hidden + 0.5) / dim,
        "class_token": class_token,
        "no_embed_class": of_big_vision,
        "global_pool": "map" if by_query else "token" if class_token else "avg",
        "fc_norm": False,
    }
