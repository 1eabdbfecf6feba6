"""Block reconstruction: training of scales, biases and norms after rounding."""

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
from dfq.vit.position_encoding import PositionEncoding

HOLD_OUT_EVERY = 4
"""One of this many trajectories is held out for validation."""

EVALUATIONS = 10
"""How many times the validation loss is computed during training."""

LEARNING_RATE = 1e-3
"""Learning rate of Adam, relative to weight scales and to the standard deviation of biases."""


class FakeQuantizedLinear(nn.Module):
    """Fake-quantized copy of an integer layer, differentiable in its scales and bias.

    The integer weights are fixed.  Rounding of the input uses the straight-through estimator
    (arXiv 1308.3432); clipped values get no gradient.
    """

    def __init__(self, layer: IntegerLinear) -> None:
        super().__init__()
        self.integers = layer.integers().float()
        self.scale, self.qparams = layer.weight_scale, layer.input_qparams
        self.log_scale = nn.Parameter(torch.zeros_like(layer.weight_scale))
        self.bias_shift = nn.Parameter(torch.zeros_like(layer.bias))
        self.bias = layer.bias
        self.bias_std = float(layer.bias.std(correction=0)) or 1.0

    @property
    def weight_scale(self) -> Tensor:
        return self.scale * self.log_scale.exp()

    @property
    def shifted_bias(self) -> Tensor:
        return self.bias + self.bias_shift * self.bias_std

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.qparams.range
        x = x.clamp(low, high)
        steps = (x / self.qparams.scale).detach()
        x = x + (steps.round() - steps) * self.qparams.scale
        return F.linear(x, self.integers * self.weight_scale[:, None], self.shifted_bias)


@dataclass
class _Tokens:
    """Tokens of a batch between two blocks.

    ``inputs`` come from the quantized blocks so far, ``targets`` from the float ones.
    """

    inputs: Tensor
    targets: Tensor
    encoding: PositionEncoding
    held_out: bool


def reconstruct(
    vit: ViT,
    quantized: QuantizedViT,
    batches: Iterable[SparseImages],
    steps: int,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[BlockLoss]:
    """Train scales, biases and layer norms of each block to match the float block's output.

    Block after block (BRECQ, arXiv 2102.05426, section 3.2), ``steps`` steps of Adam minimize the
    mean squared error between the quantized block's output, given the tokens of the quantized
    blocks before it, and the float model's tokens.  The integer weights are fixed, and attention
    is computed in floating point.  Every fourth trajectory is held out: a block keeps the state of
    least held-out error, or its original state if training did not help.

    ``vit`` is the float model; ``quantized`` is modified.  Memory: two float32 copies of all
    tokens, ``8 * images * tokens * embed_dim`` bytes, and one block's gradients.

    Returns the held-out error of each block before and after, relative to the energy of its
    output.  The callback ``advance`` is called with 1 after every block.

    Raises:
        SettingError: there are too few trajectories to hold some out.
    """
    tokens = _embed(vit, quantized, batches)
    if len({t.held_out for t in tokens}) < 2:
        raise SettingError(
            f"reconstruct holds out every {HOLD_OUT_EVERY}th trajectory, and the calibration set "
            "has too few for that. Make more images, or leave reconstruct out."
        )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for index in range(vit.arch.depth):
        num_queries = vit.arch.pooled_tokens if index == vit.arch.depth - 1 else None
        block, target = vit.block(index), cast(Block, quantized.blocks[index])
        for batch in tokens:
            with torch.no_grad():
                batch.targets = block(batch.targets, batch.encoding, num_queries)
        losses.append(_fit(index, block, target, tokens, num_queries, steps, generator))
        for batch in tokens:
            with torch.no_grad():
                batch.inputs = target(batch.inputs, batch.encoding, num_queries)
        if advance is not None:
            advance(1)
    return losses


@torch.no_grad()
def _embed(vit: ViT, quantized: QuantizedViT, batches: Iterable[SparseImages]) -> list[_Tokens]:
    preprocessing = quantized.preprocessing
    tokens = []
    for batch in batches:
        is_held_out = batch.trajectory % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        for held_out in (False, True):
            part = batch[is_held_out == held_out].to(vit.prefix.device)
            if not len(part):
                continue
            x = pixels_to_input(part.patches, preprocessing, vit.arch.grid)
            encoding = vit.position_encoding(part.positions)
            inputs, targets = (m.embed(x, part.positions) for m in (quantized, vit))
            tokens.append(_Tokens(inputs, targets, encoding, held_out))
    return tokens


def _fit(
    index: int,
    block: Block,
    target: Block,
    tokens: list[_Tokens],
    num_queries: int | None,
    steps: int,
    generator: torch.Generator,
) -> BlockLoss:
    fake_quantized = fake_quantize_block(block, target)
    training = [t for t in tokens if not t.held_out]
    validation = [t for t in tokens if t.held_out]
    parameters = [p for p in fake_quantized.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    before = best = _error(fake_quantized, validation, num_queries)
    best_state: dict[str, Tensor] | None = None
    for step in range(1, steps + 1):
        batch = training[int(torch.randint(len(training), (), generator=generator))]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss = F.mse_loss(fake_quantized(batch.inputs, batch.encoding, num_queries), batch.targets)
        (loss / batch.targets.square().mean()).backward()
        optimizer.step()
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            error = _error(fake_quantized, validation, num_queries)
            if error < best:
                best, best_state = error, copy.deepcopy(fake_quantized.state_dict())
    if best_state is not None:
        fake_quantized.load_state_dict(best_state)
        write_back(fake_quantized, target)
    return BlockLoss(f"blocks.{index}", before, best)


def fake_quantize_block(block: Block, target: Block) -> Block:
    """Return a copy of the float block with fake-quantized layers and trainable norms."""
    fake_quantized = copy.deepcopy(block).requires_grad_(False)
    for name, layer in target.named_modules():
        if isinstance(layer, IntegerLinear):
            fake_quantized.set_submodule(name, FakeQuantizedLinear(layer))
        elif isinstance(layer, nn.LayerNorm):
            norm = fake_quantized.get_submodule(name)
            norm.load_state_dict(layer.state_dict())
            norm.requires_grad_(True)
    return fake_quantized


@torch.no_grad()
def write_back(fake_quantized: Block, target: Block) -> None:
    """Copy trained scales, biases and norms into the quantized block."""
    for name, layer in target.named_modules():
        trained = fake_quantized.get_submodule(name)
        if isinstance(layer, IntegerLinear) and isinstance(trained, FakeQuantizedLinear):
            layer.weight_scale.copy_(trained.weight_scale)
            layer.bias.copy_(trained.shifted_bias)
            layer.reset()
        elif isinstance(layer, nn.LayerNorm):
            layer.load_state_dict(trained.state_dict())


@torch.no_grad()
def _error(block: Block, tokens: list[_Tokens], num_queries: int | None) -> float:
    """Return the sum of squared errors over the sum of squared targets."""
    error = signal = 0.0
    for batch in tokens:
        difference = block(batch.inputs, batch.encoding, num_queries) - batch.targets
        error += float(difference.square().sum(dtype=torch.float64))
        signal += float(batch.targets.square().sum(dtype=torch.float64))
    return error / max(signal, 1e-30)
