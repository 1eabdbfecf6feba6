"""Rescaled channels: the same function with very different ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from safetensors.torch import save_file

from calibration_bench.core.rescale import MOST, rescale, rescale_file
from dfq.errors import DataError


def test_the_function_stays_and_the_channels_differ() -> None:
    model: Any = make_vit().eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    before = model.blocks[0].norm1.weight.detach().clone()
    model.load_state_dict(rescale(model.state_dict(), seed=1))
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)
    factor = model.blocks[0].norm1.weight.detach() / before
    assert 1 / MOST <= float(factor.min()) < 0.2
    assert 5 < float(factor.max()) <= MOST


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    save_file(make_vit().state_dict(), tmp_path / "in.safetensors")
    for name in ("a", "b"):
        rescale_file(tmp_path / "in.safetensors", tmp_path / name, 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        rescale_file(tmp_path / "text", tmp_path / "out", 0)
    with pytest.raises(DataError, match="no blocks"):
        rescale({"head.weight": torch.zeros(2, 2)}, 0)
    with pytest.raises(DataError, match=r"no 'blocks\.0"):
        rescale({"blocks.0.norm1.weight": torch.zeros(2)}, 0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="exists"):
        rescale_file(tmp_path / "text", tmp_path / "text", 0)
