"""Training of the demo ViT on Fashion-MNIST: ``python -m dfq.demo.train --data DIR --out DIR``.

A small convolutional network is trained first and the ViT learns from its soft
predictions as well as from the labels (distillation as in DeiT, arXiv 2012.12877,
section 3, with the soft loss).  The ViT's attention starts as a trained one looks (mimetic
initialization, arXiv 2305.09828), on patches of 4x4 pixels, a quarter of the tokens; then
its patch and position embeddings are resampled to 2x2 pixels, as FlexiViT does (arXiv
2212.08013), and it goes on with half of the tokens dropped (PatchDropout, arXiv
2208.07220) and finally with all.

``--data`` is a directory with the four ``*-ubyte.gz`` files of Fashion-MNIST; Debian's
package ``dataset-fashion-mnist`` puts them in ``/usr/share/datasets/fashion-mnist``.
Written to ``--out``: ``demo_vit.safetensors`` (fp16), ``fashion_mnist_test_2k.npz``
(the first 2,000 test images) and ``card.json`` (what the model reached).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import PatchDropout, build_sincos2d_pos_embed
from torch import Tensor, nn

from dfq.demo import CLASSES, MEAN, MODEL_ARGS, STD


@dataclass(frozen=True)
class Phase:
    """Phase of the ViT's training, with its own learning-rate decay."""

    epochs: int
    patch_size: int
    patch_drop: float
    lr: float


PHASES = (Phase(6, 4, 0.0, 3e-3), Phase(2, 2, 0.5, 2e-3), Phase(1, 2, 0.0, 1e-3))

SLICE = 2000


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    ndim = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load_split(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read images uint8 ``[N, 1, 28, 28]`` and labels int64 ``[N]`` of ``train`` or ``t10k``."""
    images = read_idx(data / f"{split}-images-idx3-ubyte.gz").copy()
    labels = read_idx(data / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels)


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 pixels to the network's input."""
    return (images.float() / 255 - MEAN[0]) / STD[0]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and move each by up to two pixels."""
    n, _, side, _ = images.shape
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2))
    moves = torch.randint(0, 5, (2, n), generator=generator)
    span = torch.arange(side)
    rows = (moves[0, :, None] + span)[:, None, :, None]
    columns = (moves[1, :, None] + span)[:, None, None, :]
    return padded[
        torch.arange(n)[:, None, None, None], torch.arange(1)[None, :, None, None], rows, columns
    ]


def batches(
    images: Tensor, labels: Tensor, batch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of augmented, normalized batches; an incomplete last one is dropped."""
    order = torch.randperm(len(images), generator=generator)
    for start in range(0, len(images) - batch + 1, batch):
        index = order[start : start + batch]
        yield normalize(augment(images[index], generator)), labels[index]


def make_teacher() -> nn.Sequential:
    """Create a VGG-like network of 0.7 M parameters for 28x28 gray images."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *stage(1, 32),
        *stage(32, 32),
        nn.MaxPool2d(2),
        *stage(32, 64),
        *stage(64, 64),
        nn.MaxPool2d(2),
        *stage(64, 128),
        *stage(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, len(CLASSES)),
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in float32, from 0 to 1."""
    model.eval()
    with torch.inference_mode():
        hits = [
            (model(normalize(x)).argmax(-1) == y).sum().item()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(hits) / len(images)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch: int = 128,
) -> None:
    """Train with Muon for the blocks' matrices and AdamW for the rest; print a line per epoch."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
    matrices = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.01)]
    if hidden:
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    steps = epochs * (len(train[0]) // batch)
    warmup = min(200, steps // 10)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: _decay(i, steps, warmup)) for o in optimizers
    ]
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for x, y in batches(*train, batch, generator):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            value = loss(logits.float(), x, y)
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            total += value.item()
        reached = accuracy(model, test[0][:SLICE], test[1][:SLICE])
        print(
            f"{type(model).__name__} epoch {epoch + 1}/{epochs}: "
            f"loss {total * batch / len(train[0]):.4f}, "
            f"test slice {reached:.4f}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )


def _decay(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor: linear warm-up, then half a cosine to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) + 1e-2


@torch.no_grad()
def initialize(model: Any) -> None:
    """Initialize attention layers like trained ones (arXiv 2305.09828, section 3).

    Queries times keys start near the identity, values times projection near its negative,
    and position embeddings as sinusoids.
    """
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    width = dim // heads
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        for h in range(heads):
            u, s, vt = torch.linalg.svd(
                0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim)
            )
            rows = slice(h * width, (h + 1) * width)
            q[rows] = (u[:, :width] * s[:width].sqrt()).T
            k[rows] = vt[:width] * s[:width, None].sqrt()
        u, s, vt = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
        v.copy_((u * s.sqrt()).T)
        block.attn.proj.weight.copy_(vt.T * s.sqrt())
    grid = model.patch_embed.grid_size
    model.pos_embed[:, 1:] = build_sincos2d_pos_embed(list(grid), dim)


def distillation_loss(teacher: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the loss: half cross-entropy with labels, half with the teacher's predictions."""

    def loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            soft = teacher(x).float().softmax(-1)
        return 0.5 * F.cross_entropy(logits, y) + 0.5 * F.cross_entropy(logits, soft)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = load_split(args.data, "train"), load_split(args.data, "t10k")
    args.out.mkdir(parents=True, exist_ok=True)

    teacher = make_teacher().to(memory_format=torch.channels_last)
    fit(
        teacher,
        lambda logits, _, y: F.cross_entropy(logits, y, label_smoothing=0.05),
        train,
        test,
        epochs=args.teacher_epochs,
        lr=3e-3,
        seed=args.seed,
    )
    teacher_accuracy = accuracy(teacher, *test)
    print(f"teacher: {teacher_accuracy:.4f} on 10,000 test images", flush=True)

    timm.layers.set_fused_attn(False)
    model: Any = timm.create_model(**{**MODEL_ARGS, "patch_size": PHASES[0].patch_size})
    initialize(model)
    model.patch_drop = PatchDropout(0.0)
    for phase in PHASES:
        model.set_input_size(patch_size=phase.patch_size)
        model.patch_drop.prob = phase.patch_drop
        fit(
            model,
            distillation_loss(teacher.eval()),
            train,
            test,
            epochs=phase.epochs,
            lr=phase.lr,
            seed=args.seed + 1,
        )
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in state.items()})
    card = {
        "model": MODEL_ARGS,
        "classes": CLASSES,
        "parameters": sum(p.numel() for p in model.parameters()),
        "teacher_top1_10k": teacher_accuracy,
        "top1_10k": accuracy(model, *test),
        "top1_slice": accuracy(model, test[0][:SLICE], test[1][:SLICE]),
        "phases": [asdict(phase) for phase in PHASES],
        "seed": args.seed,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    save_file(state, args.out / "demo_vit.safetensors")
    np.savez_compressed(
        args.out / "fashion_mnist_test_2k.npz",
        x=test[0][:SLICE, 0].numpy(),
        y=test[1][:SLICE].numpy().astype(np.uint8),
    )
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
