"""Vision transformer as an ONNX graph, on all patches in order."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dfq.exporting.graph import Graph
from dfq.vit import Architecture, Attention, Block, Mlp, ViT
from dfq.vit.architecture import Activation
from dfq.vit.modules import AttentionPool
from dfq.vit.position_encoding import PositionEncoding

IMAGES = "images"


class Products(Protocol):
    """Writer of matrix products; names are those of :func:`dfq.quantization.scheme.layers`."""

    def images(self, graph: Graph, x: str, /) -> str:
        """Write the conversion of normalized images to the patch embedding's input."""

    def linear(self, graph: Graph, name: str, x: str) -> str:
        """Write a linear layer, ``[..., in]`` to ``[..., out]``."""

    def attention(
        self, graph: Graph, name: str, q: str, k: str, v: str, bias: str | None, scale: float, /
    ) -> str:
        """Write attention of ``q`` ``[B, H, R, D]``, ``k`` ``[B, H, D, T]`` and ``v``
        ``[B, H, T, D]``; returns ``[B, H, R, D]``.  ``scale`` multiplies the scores."""


def softmax_of(graph: Graph, scores: str, bias: str | None) -> str:
    """Write the softmax over the last dimension."""
    scores = scores if bias is None else graph.op("Add", scores, bias)
    return graph.op("Softmax", scores, axis=-1)


class Transformer:
    """Writer of a model into a graph."""

    def __init__(self, graph: Graph, vit: ViT, products: Products) -> None:
        self.graph, self.vit, self.products = graph, vit, products
        self.arch: Architecture = vit.arch
        self.tokens = vit.arch.num_prefix_tokens + vit.arch.grid.patches
        self.encoding: PositionEncoding = vit.position_encoding(None)
        self.shared: dict[str, str] = {}

    def write(self, output: str) -> None:
        """Write the whole model, from ``images`` to ``output``."""
        x = self.embed(IMAGES)
        for index in range(self.arch.depth):
            last = index == self.arch.depth - 1
            num_queries = self.arch.pooled_tokens if last else None
            with self.graph.part(f"blocks.{index}"):
                x = self.block(self.vit.block(index), f"blocks.{index}", x, num_queries)
        x = self.pool(self.norm(self.vit.norm, "norm", x))
        x = self.norm(self.vit.fc_norm, "fc_norm", x)
        if self.arch.num_classes:
            x = self.linear("head", x)
        x = self.graph.shaped(x, 0, self.arch.num_classes or self.arch.embed_dim)
        self.graph.rename(x, output)

    def linear(self, name: str, x: str, part: str | None = None) -> str:
        with self.graph.part(part or name):
            return self.products.linear(self.graph, name, x)

    def norm(self, norm: nn.Module, part: str, x: str) -> str:
        """Write a layer norm over the last dimension; other modules are the identity."""
        if not isinstance(norm, nn.LayerNorm):
            return x
        with self.graph.part(part):
            weight = self.graph.constant("weight", norm.weight)
            bias = self.graph.constant("bias", norm.bias)
            return self.graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)

    def embed(self, images: str) -> str:
        """Images to tokens ``[B, T, embed_dim]``."""
        graph, vit = self.graph, self.vit
        with graph.part("patch_embed"):
            x = self.patchify(self.products.images(graph, images))
            x = self.products.linear(graph, "patch_embed", x)
        x = self.norm(vit.patch_norm, "patch_norm", x)
        with graph.part("pos_embed"):
            x = graph.op("Add", x, graph.constant("table", vit.pos_embed[None]))
        if self.arch.num_prefix_tokens:
            with graph.part("prefix"):
                batch = graph.op("Shape", x, start=0, end=1)
                rest = graph.constant("rest", list(vit.prefix.shape))
                shape = graph.op("Concat", batch, rest, axis=0)
                prefix = graph.op("Expand", graph.constant("table", vit.prefix[None]), shape)
                x = graph.op("Concat", prefix, x, axis=1)
        return self.norm(vit.norm_pre, "norm_pre", x)

    def patchify(self, x: str) -> str:
        """As :func:`dfq.sparse.patchify`."""
        graph, grid = self.graph, self.arch.grid
        (ph, pw), c = grid.patch_size, grid.channels
        used = (grid.rows * ph, grid.columns * pw)
        if used != grid.image_size:
            ends = [graph.constant(n, v) for n, v in (("ends", list(used)), ("axes", [2, 3]))]
            x = graph.op("Slice", x, graph.constant("starts", [0, 0]), *ends)
        x = graph.shaped(x, 0, c, grid.rows, ph, grid.columns, pw)
        x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
        return graph.shaped(x, 0, grid.patches, grid.patch_values)

    def block(self, block: Block, name: str, x: str, num_queries: int | None) -> str:
        graph = self.graph
        y = self.attention(block.attn, name, self.norm(block.norm1, "norm1", x), num_queries)
        x = graph.op("Add", self.first(x, num_queries), y)
        y = self.mlp(block.mlp, f"{name}.mlp", self.norm(block.norm2, "norm2", x))
        return graph.op("Add", x, y)

    def first(self, x: str, num_queries: int | None, axis: int = 1) -> str:
        """Write a slice of the first ``num_queries`` along an axis."""
        return x if num_queries is None else self.slice(x, 0, num_queries, axis)

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        bounds = [("start", start), ("end", end), ("axis", axis)]
        return self.graph.op("Slice", x, *(self.graph.constant(n, [v]) for n, v in bounds))

    def attention(self, attn: Attention, name: str, x: str, num_queries: int | None) -> str:
        graph, heads, width = self.graph, attn.num_heads, attn.head_dim
        qkv = self.linear(f"{name}.attn.qkv", x, "attn.qkv")
        with graph.part("attn"):
            parts = graph.nodes_of("Split", qkv, outputs=3, axis=-1, num_outputs=3)
            q, k, v = (graph.shaped(p, 0, self.tokens, heads, width) for p in parts)
            q = self.first(self.normed_and_rotated(attn.q_norm, "q_norm", q), num_queries, axis=2)
            k = self.normed_and_rotated(attn.k_norm, "k_norm", k, transposed=True)
            v = graph.op("Transpose", v, perm=[0, 2, 1, 3])
            bias = self.bias(attn.relative_bias, num_queries)
            x = self.products.attention(graph, name, q, k, v, bias, width**-0.5)
            x = graph.op("Transpose", x, perm=[0, 2, 1, 3])
            x = graph.shaped(x, 0, num_queries or self.tokens, heads * width)
            x = self.norm(attn.norm, "norm", x)
        return self.linear(f"{name}.attn.proj", x, "attn.proj")

    def normed_and_rotated(
        self, norm: nn.Module, part: str, x: str, *, transposed: bool = False
    ) -> str:
        """Write norm and rotary embedding of queries or keys ``[B, T, H, D]``; returns
        ``[B, H, T, D]``, or ``[B, H, D, T]`` if ``transposed``."""
        if isinstance(norm, nn.LayerNorm) or self.encoding.sin is not None:
            x = self.rotate(self.norm(norm, part, self.graph.op("Transpose", x, perm=[0, 2, 1, 3])))
            return self.graph.op("Transpose", x, perm=[0, 1, 3, 2]) if transposed else x
        return self.graph.op("Transpose", x, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])

    def rotate(self, x: str) -> str:
        """Rotary embedding as in :class:`dfq.vit.position_encoding.PositionEncoding`, with the sign
        in the table."""
        graph, sin, cos = self.graph, self.encoding.sin, self.encoding.cos
        if sin is None or cos is None:
            return x
        first, second = sin.chunk(2, dim=-1)
        sines = self.shared_constant("sin", torch.cat([-first, second], dim=-1))
        halves = graph.nodes_of("Split", x, outputs=2, axis=-1, num_outputs=2)
        swapped = graph.op("Concat", *reversed(halves), axis=-1)
        kept = graph.op("Mul", x, self.shared_constant("cos", cos))
        return graph.op("Add", kept, graph.op("Mul", swapped, sines))

    def shared_constant(self, name: str, value: Tensor) -> str:
        """Return a constant that several parts share; it is written once."""
        if name not in self.shared:
            self.shared[name] = self.graph.constant(name, value)
        return self.shared[name]

    def bias(self, table: Tensor | None, num_queries: int | None) -> str | None:
        """Write the biases of the scores, ``[H, R, T]``."""
        if table is None or self.encoding.bias_index is None:
            return None
        index = self.encoding.bias_index[0, :num_queries]
        table_name = self.graph.constant("relative_bias", table.T)
        return self.graph.op(
            "Gather", table_name, self.shared_constant(f"index_{num_queries}", index), axis=1
        )

    def mlp(self, mlp: Mlp, name: str, x: str) -> str:
        graph, part = self.graph, name.partition(".mlp")[1][1:]
        x = self.linear(f"{name}.fc1", x, f"{part}.fc1")
        with graph.part(part):
            if mlp.gated:
                gate, value = graph.nodes_of("Split", x, outputs=2, axis=-1, num_outputs=2)
                x = graph.op("Mul", self.activate(gate, mlp.activation), value)
            else:
                x = self.activate(x, mlp.activation)
            x = self.norm(mlp.norm, "norm", x)
        return self.linear(f"{name}.fc2", x, f"{part}.fc2")

    def activate(self, x: str, activation: Activation) -> str:
        graph = self.graph
        if activation in ("gelu", "gelu_tanh"):
            return graph.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")
        inner = x
        if activation == "quick_gelu":
            inner = graph.op("Mul", x, graph.scalar("slope", 1.702))
        return graph.op("Mul", x, graph.op("Sigmoid", inner))

    def pool(self, x: str) -> str:
        """Pool normed tokens to ``[B, 1, head_inputs]``, before the last norm.

        Three dimensions are kept, because ONNX Runtime turns a 2-D product into a float Gemm.
        """
        graph, arch = self.graph, self.arch
        with graph.part("pool"):
            if arch.pool == "token":
                return self.slice(x, 0, 1, 1)
            if arch.pool == "distilled":
                x, width = self.slice(x, 0, 2, 1), 2 * arch.embed_dim
                return graph.shaped(x, 0, 1, width) if arch.num_classes else self.mean(x)
            if not arch.pool_includes_prefix and arch.num_prefix_tokens:
                x = self.slice(x, arch.num_prefix_tokens, self.tokens, 1)
            if arch.pool == "avg":
                return self.mean(x)
        assert isinstance(self.vit.attn_pool, AttentionPool)
        return self.query(self.vit.attn_pool, x)

    def mean(self, x: str) -> str:
        return self.graph.op("ReduceMean", x, self.graph.constant("axes", [1]), keepdims=1)

    def query(self, pool: AttentionPool, x: str) -> str:
        """Write attention pooling; its attention is in floating point.

        The number of tokens is written out: a -1 in Reshape is undefined for a batch of 0.
        """
        prefix = 0 if self.arch.pool_includes_prefix else self.arch.num_prefix_tokens
        tokens, graph, name = self.tokens - prefix, self.graph, "attn_pool"
        heads, width = pool.query.shape
        kv = self.linear(f"{name}.kv", x)
        with graph.part(name):
            parts = graph.nodes_of("Split", kv, outputs=2, axis=-1, num_outputs=2)
            k, v = (graph.shaped(p, 0, tokens, heads, width) for p in parts)
            k = graph.op("Transpose", k, perm=[0, 2, 3, 1])
            v = graph.op("Transpose", v, perm=[0, 2, 1, 3])
            query = graph.constant("query", pool.query[None, :, None] * width**-0.5)
            y = graph.op("MatMul", softmax_of(graph, graph.op("MatMul", query, k), None), v)
            y = graph.shaped(graph.op("Transpose", y, perm=[0, 2, 1, 3]), 0, 1, heads * width)
        y = self.linear(f"{name}.proj", y)
        with graph.part(name):
            hidden = self.norm(pool.norm, "norm", y)
            return graph.op("Add", y, self.mlp(pool.mlp, "attn_pool.mlp", hidden))
