"""Models of timm's small test architecture, and their files."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

NAME = "test_vit"
"""timm's own test model: 64 wide, 6 blocks, patches of 16 pixels."""


def timm_model(seed: int = 0, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(NAME, **{"img_size": 32, "num_classes": 5, **changes})
