"""Recording of trajectories while they are optimized, and pictures of their attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfq.data.preview import BACKGROUND, enlarge, sheet, write_png
from dfq.inversion import Callback
from dfq.sparse import Grid, unpatchify

LEAVING = np.array([255, 150, 40]) / 255
STAYING = np.array([150, 200, 255]) / 255


class Recorder(Callback):
    """Callbacks that record losses, live patches and rankings of a unit of work."""

    def __init__(self, trajectories: int) -> None:
        self.trajectories = trajectories
        self.losses: list[float] = []
        self.live: list[int] = []
        self.rankings: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_iteration(self, loss: Tensor, positions: Tensor) -> None:
        self.losses.append(float(loss) / self.trajectories)
        self.live.append(positions.shape[1])

    def on_selection(self, importance: Tensor, positions: Tensor, leaving: Tensor) -> None:
        self.rankings.append((importance.cpu(), positions.cpu(), leaving.cpu()))


def kept_share(importance: Tensor, leaving: Tensor) -> float:
    """Return the mean importance of the leaving patches over the mean of all patches."""
    part = importance.gather(1, leaving).mean(1) / importance.mean(1)
    return float(part.mean())


def draw_attention(
    rankings: list[tuple[Tensor, Tensor, Tensor]], grid: Grid, out: Path, rows: int = 8
) -> Path:
    """Draw trajectories as rows and rankings as columns: brighter patches are more important,
    orange ones leave, blue ones stay, dark gray ones left before."""
    cells: dict[tuple[int, int], np.ndarray] = {}
    for column, (importance, positions, leaving) in enumerate(rankings):
        heat = (importance / importance.amax(1, keepdim=True)).clamp(0, 1).sqrt()
        leaves = torch.zeros_like(heat).scatter_(1, leaving, 1.0)
        for row in range(min(rows, len(heat))):
            cells[row, column] = _map(heat[row], leaves[row], positions[row], grid)
    return write_png(sheet(cells), out)


def _map(heat: Tensor, leaves: Tensor, positions: Tensor, grid: Grid) -> np.ndarray:
    """Return a picture uint8 ``[H, W, 3]`` with one value per patch."""
    colors = torch.tensor(np.where(leaves[:, None] > 0, LEAVING, STAYING))
    values = (heat[:, None].double() * colors * 255).clamp(0, 255)
    small = Grid((grid.rows, grid.columns), (1, 1), 3)
    pixels = unpatchify(values[None], positions[None], small, fill=BACKGROUND)[0]
    return enlarge(pixels.permute(1, 2, 0).numpy().astype(np.uint8))
