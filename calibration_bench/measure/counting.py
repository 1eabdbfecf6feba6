"""Operations and bytes of one iteration of inversion, counted from the architecture.

An iteration is a token-sparse forward pass and the gradient with respect to the patches: one
matrix product forward and one backward for each linear layer (its weights need no gradient), one
forward and two backward for each of the two products of attention.  If only prefix tokens are
classified, the last block needs keys and values of all tokens and everything else of the prefix
tokens only.  The cost of the first block's prefix tokens, the same in every iteration, is
included (below 1 %).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dfq.vit import Architecture

FLOAT = 4
"""Bytes per value of pixels and of Adam's moments."""


@dataclass(frozen=True)
class Product:
    """``count`` times ``batch`` matrix products ``[m, k] @ [k, n]``.

    ``weight``: the right factor is a weight, stored as ``[n, k]`` and shared by the batch.
    """

    name: str
    m: int
    k: int
    n: int
    batch: int = 1
    count: int = 1
    backward: bool = False
    weight: bool = True

    @property
    def operations(self) -> int:
        """Number of operations: two for each multiply-add."""
        return 2 * self.count * self.batch * self.m * self.k * self.n

    @property
    def values(self) -> int:
        """Number of values read and written."""
        sides = self.m * self.k + self.k * self.n + self.m * self.n
        return self.count * self.batch * sides


def products(
    arch: Architecture, live: int, batch: int, *, whole_last_block: bool = False
) -> list[Product]:
    """Return the matrix products of an iteration over ``batch`` images of ``live`` patches.

    ``whole_last_block``: count all tokens in the last block, even those that are not needed.
    """
    tokens, dim = arch.num_prefix_tokens + live, arch.embed_dim
    rows = None if whole_last_block else arch.pooled_tokens
    full = arch.depth - (rows is not None)
    needed = [*_linear("embed", batch * live, arch.grid.patch_values, dim)]
    needed += _block(arch, tokens, tokens, batch, full)
    if rows is not None:
        needed += _block(arch, tokens, rows, batch, 1)
    if arch.pool == "map":
        needed += _pool(arch, tokens if arch.pool_includes_prefix else live, batch)
    needed += _linear("head", batch, arch.head_inputs, arch.num_classes)
    return needed


def _pool(arch: Architecture, tokens: int, batch: int) -> Iterator[Product]:
    """Return the products of attention pooling (one learned query, no gradient) and its MLP."""
    dim, heads = arch.embed_dim, batch * arch.pool_heads
    width = dim // arch.pool_heads
    yield from _linear("pool kv", batch * tokens, dim, 2 * dim)
    for name, m, k, n, backward in (
        ("scores", 1, width, tokens, False),
        ("mix", 1, tokens, width, False),
        ("d scores", 1, width, tokens, True),
        ("d values", tokens, 1, width, True),
        ("d keys", tokens, 1, width, True),
    ):
        yield Product(name, m, k, n, heads, 1, backward, weight=False)
    yield from _linear("pool proj", batch, dim, dim)
    yield from _linear("pool fc1", batch, dim, arch.pool_hidden)
    yield from _linear("pool fc2", batch, arch.pool_hidden, dim)


def _linear(name: str, rows: int, width: int, out: int, count: int = 1) -> Iterator[Product]:
    """Return the products of a linear layer: its output and the gradient of its input."""
    yield Product(name, rows, width, out, count=count)
    yield Product(name, rows, out, width, count=count, backward=True)


def _block(
    arch: Architecture, tokens: int, queries: int, batch: int, count: int
) -> Iterator[Product]:
    """Return the products of ``count`` blocks with ``queries`` queries and ``tokens`` keys."""
    dim, inner, rows = arch.embed_dim, arch.attention_dim, batch * queries
    if queries == tokens:
        yield from _linear("qkv", rows, dim, 3 * inner, count)
    else:
        yield from _linear("kv", batch * tokens, dim, 2 * inner, count)
        yield from _linear("q", rows, dim, inner, count)
    yield from _attention(arch, tokens, queries, batch, count)
    yield from _linear("proj", rows, inner, dim, count)
    yield from _linear("fc1", rows, dim, (2 if arch.gated_mlp else 1) * arch.mlp_hidden, count)
    yield from _linear("fc2", rows, arch.mlp_hidden, dim, count)


def _attention(
    arch: Architecture, tokens: int, queries: int, batch: int, count: int
) -> Iterator[Product]:
    """Return both products of attention, and the gradients of both factors of each."""
    heads, width = batch * arch.num_heads, arch.head_dim

    def product(name: str, m: int, k: int, n: int, backward: bool) -> Product:
        return Product(name, m, k, n, heads, count, backward, weight=False)

    yield product("scores", queries, width, tokens, False)
    yield product("mix", queries, tokens, width, False)
    yield product("d scores", queries, width, tokens, True)
    yield product("d values", tokens, queries, width, True)
    yield product("d queries", queries, tokens, width, True)
    yield product("d keys", tokens, queries, width, True)


def operations(arch: Architecture, live: int, batch: int) -> int:
    """Count the operations of the matrix products of an iteration; all others are below 1 %."""
    return sum(product.operations for product in products(arch, live, batch))


def compulsory_bytes(arch: Architecture, live: int, batch: int, size: int) -> int:
    """Count the bytes of memory traffic if activations stay in the caches: the lower bound.

    Weights of ``size`` bytes per value are read in the forward and in the backward pass; pixels
    and Adam's moments are read and written.
    """
    matrices = sum(
        p.count * p.k * p.n for p in products(arch, live, 1, whole_last_block=True) if p.weight
    )
    return size * matrices + FLOAT * 6 * batch * live * arch.grid.patch_values


def unfused_bytes(arch: Architecture, live: int, batch: int, size: int) -> int:
    """Count the bytes of memory traffic if every operation reads and writes memory.

    Matrix products, norms, softmax, activations and residuals take ``size`` bytes per value;
    pixels, total variation and Adam are in float32.
    """
    tokens = arch.num_prefix_tokens + live
    hidden = batch * tokens * arch.embed_dim
    weights = batch * arch.num_heads * tokens**2
    inner = batch * tokens * arch.mlp_hidden
    block = 5 * (2 * hidden + inner + weights) + 4 * 2 * hidden
    matrices = sum(p.values for p in products(arch, live, batch))
    pixels = batch * live * arch.grid.patch_values
    return size * (matrices + arch.depth * block) + FLOAT * 20 * pixels
