"""Block reconstruction: what rounding left of each block's error, learnt away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.errors import SettingError
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.model import QuantizedViT
from dfq.results.values import BlockLoss
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Block, ViT
from dfq.vit.relations import Relations

HELD_OUT = 4
"""Every so many trajectories one is held out."""

CHECKS = 10
"""How often the held-out loss is looked at."""

RATE = 1e-3
"""Step size of Adam, in shares of a weight scale and of the norms' and biases' spread."""


class SimulatedLinear(nn.Module):
    """An integer layer between floats, differentiable in its scales and its bias.

    The integers stay.  Rounding of the input passes gradients on as they are, clipping does
    not (arXiv 1308.3432).
    """

    def __init__(self, layer: IntegerLinear) -> None:
        super().__init__()
        self.integers = layer.integers().float()
        self.scale, self.quantizer = layer.weight_scale, layer.input_qparams
        self.change = nn.Parameter(torch.zeros_like(layer.weight_scale))
        self.shift = nn.Parameter(torch.zeros_like(layer.bias))
        self.bias = layer.bias
        self.spread = float(layer.bias.std(correction=0)) or 1.0

    @property
    def weight_scale(self) -> Tensor:
        return self.scale * self.change.exp()

    @property
    def shifted_bias(self) -> Tensor:
        return self.bias + self.shift * self.spread

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.quantizer.range
        x = x.clamp(low, high)
        steps = (x / self.quantizer.scale).detach()
        x = x + (steps.round() - steps) * self.quantizer.scale
        return F.linear(x, self.integers * self.weight_scale[:, None], self.shifted_bias)


@dataclass
class _Tokens:
    """Inputs of a block for images of one number of patches, and where these are.

    ``rounded`` comes from the quantized blocks before it, ``exact`` from the float ones.
    """

    rounded: Tensor
    exact: Tensor
    at: Relations
    held_out: bool


def reconstruct(
    vit: ViT,
    quantized: QuantizedViT,
    batches: Iterable[SparseImages],
    steps: int,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[BlockLoss]:
    """Fit scales, biases and layer norms of each block to the float block's output.

    Block after block (BRECQ, arXiv 2102.05426, section 3.2) ``steps`` steps of Adam lower the
    mean square error between the block on what the quantized blocks before it give, and the
    float model's tokens.  The integers of the weights stay, attention's products are taken in
    floating point.  Every fourth trajectory is held out; a block keeps what was best on
    those, and stays as it is if nothing was better, so none gets worse there.

    ``vit`` is the float model that was quantized; ``quantized`` is changed.  Memory: two
    float32 copies of all tokens, ``8 * images * tokens * embed_dim`` bytes, and one block's
    gradients.

    Returns the held-out error of each block before and after, relative to its output's
    square.  ``advance`` is called with 1 after every block.

    Raises:
        SettingError: there are too few trajectories to hold some out.
    """
    tokens = _embed(vit, quantized, batches)
    if len({t.held_out for t in tokens}) < 2:
        raise SettingError(
            f"reconstruct holds out every {HELD_OUT}th trajectory, and the calibration set has too "
            "few for that. Make more images, or leave reconstruct out."
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(vit.arch.depth):
        rows = vit.arch.pooled_tokens if index == vit.arch.depth - 1 else None
        block, target = vit.block(index), cast(Block, quantized.blocks[index])
        for batch in tokens:
            with torch.no_grad():
                batch.exact = block(batch.exact, batch.at, rows)
        found.append(_fit(index, block, target, tokens, rows, steps, generator))
        for batch in tokens:
            with torch.no_grad():
                batch.rounded = target(batch.rounded, batch.at, rows)
        if advance is not None:
            advance(1)
    return found


@torch.no_grad()
def _embed(vit: ViT, quantized: QuantizedViT, batches: Iterable[SparseImages]) -> list[_Tokens]:
    preprocessing = quantized.preprocessing
    found = []
    for batch in batches:
        held = batch.trajectory % HELD_OUT == HELD_OUT - 1
        for chosen in (False, True):
            part = batch[held == chosen].to(vit.prefix.device)
            if not len(part):
                continue
            x = pixels_to_input(part.patches, preprocessing, vit.arch.grid)
            at = vit.relations(part.positions)
            rounded, exact = (m.embed(x, part.positions) for m in (quantized, vit))
            found.append(_Tokens(rounded, exact, at, chosen))
    return found


def _fit(
    index: int,
    block: Block,
    target: Block,
    tokens: list[_Tokens],
    rows: int | None,
    steps: int,
    generator: torch.Generator,
) -> BlockLoss:
    simulated = simulate(block, target)
    seen = [t for t in tokens if not t.held_out]
    unseen = [t for t in tokens if t.held_out]
    parameters = [p for p in simulated.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    before = best = _error(simulated, unseen, rows)
    kept: dict[str, Tensor] | None = None
    for step in range(1, steps + 1):
        batch = seen[int(torch.randint(len(seen), (), generator=generator))]
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss = F.mse_loss(simulated(batch.rounded, batch.at, rows), batch.exact)
        (loss / batch.exact.square().mean()).backward()
        optimizer.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            error = _error(simulated, unseen, rows)
            if error < best:
                best, kept = error, copy.deepcopy(simulated.state_dict())
    if kept is not None:
        simulated.load_state_dict(kept)
        write_back(simulated, target)
    return BlockLoss(f"blocks.{index}", before, best)


def simulate(block: Block, target: Block) -> Block:
    """The float block with the quantized one's layers and norms, differentiable in these."""
    simulated = copy.deepcopy(block).requires_grad_(False)
    for name, layer in target.named_modules():
        if isinstance(layer, IntegerLinear):
            simulated.set_submodule(name, SimulatedLinear(layer))
        elif isinstance(layer, nn.LayerNorm):
            norm = simulated.get_submodule(name)
            norm.load_state_dict(layer.state_dict())
            norm.requires_grad_(True)
    return simulated


@torch.no_grad()
def write_back(simulated: Block, target: Block) -> None:
    """Put what was learnt into the quantized block."""
    for name, layer in target.named_modules():
        learnt = simulated.get_submodule(name)
        if isinstance(layer, IntegerLinear) and isinstance(learnt, SimulatedLinear):
            layer.weight_scale.copy_(learnt.weight_scale)
            layer.bias.copy_(learnt.shifted_bias)
            layer.reset()
        elif isinstance(layer, nn.LayerNorm):
            layer.load_state_dict(learnt.state_dict())


@torch.no_grad()
def _error(block: Block, tokens: list[_Tokens], rows: int | None) -> float:
    """Sum of squared errors over that of the squared outputs."""
    error = signal = 0.0
    for batch in tokens:
        difference = block(batch.rounded, batch.at, rows) - batch.exact
        error += float(difference.square().sum(dtype=torch.float64))
        signal += float(batch.exact.square().sum(dtype=torch.float64))
    return error / max(signal, 1e-30)
