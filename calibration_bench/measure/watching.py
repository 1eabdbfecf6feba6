"""What is recorded of trajectories while they are optimized, and pictures of it."""

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
    """Losses and live patches of every iteration, and every ranking, of a unit of work."""

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
    """Importance of the leaving patches over what as many average ones would have."""
    part = importance.gather(1, leaving).mean(1) / importance.mean(1)
    return float(part.mean())


def draw_attention(
    rankings: list[tuple[Tensor, Tensor, Tensor]], grid: Grid, out: Path, rows: int = 8
) -> Path:
    """A row for each trajectory and a column for each ranking: brighter is more important,
    orange leaves, blue stays, dark gray had left before."""
    cells: dict[tuple[int, int], np.ndarray] = {}
    for column, (importance, positions, leaving) in enumerate(rankings):
        heat = (importance / importance.amax(1, keepdim=True)).clamp(0, 1).sqrt()
        leaves = torch.zeros_like(heat).scatter_(1, leaving, 1.0)
        for row in range(min(rows, len(heat))):
            cells[row, column] = _map(heat[row], leaves[row], positions[row], grid)
    return write_png(sheet(cells), out)


def _map(heat: Tensor, leaves: Tensor, positions: Tensor, grid: Grid) -> np.ndarray:
    """A picture uint8 ``[H, W, 3]`` of a value a patch."""
    colors = torch.tensor(np.where(leaves[:, None] > 0, LEAVING, STAYING))
    values = (heat[:, None].double() * colors * 255).clamp(0, 255)
    small = Grid((grid.rows, grid.columns), (1, 1), 3)
    pixels = unpatchify(values[None], positions[None], small, fill=BACKGROUND)[0]
    return enlarge(pixels.permute(1, 2, 0).numpy().astype(np.uint8))
