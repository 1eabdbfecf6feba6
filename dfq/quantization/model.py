"""Quantized vision transformer, and its construction from a float one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from dfq import runtime
from dfq.device import without_autocast
from dfq.errors import SettingError
from dfq.quantization import rounding
from dfq.quantization.layers import (
    AttentionProduct,
    IntegerLinear,
    IntegerPatchEmbed,
    check_types,
)
from dfq.quantization.scheme import ATTENTION_INPUTS, Scheme, layers
from dfq.recipe import QuantizationSettings
from dfq.runtime import opaque
from dfq.runtime.elementwise import attention_dtype
from dfq.runtime.graphs import GraphCache
from dfq.runtime.params import KernelRequirements, OutputFormat
from dfq.runtime.qtype import INT8, QParams
from dfq.sparse import channel_values
from dfq.vit import Architecture, Attention, Block, Mlp, Preprocessing, ViT
from dfq.vit.modules import AttentionPool
from dfq.vit.position_encoding import PositionEncoding

if TYPE_CHECKING:
    from dfq.quantization.calibration import Calibration, InputStatistics

PIXEL_QPARAMS = QParams(1 / 255)

RANGE_CENTER = 0.5
"""Center of the input range, in units of its width.  If the mean lies outside the range, the patch
embedding's bias is corrected at this value instead of the mean."""


class QuantizedAttention(Attention):
    """Multi-head self-attention with integer linear layers."""

    qkv: IntegerLinear
    proj: IntegerLinear
    product: AttentionProduct

    def __init__(self, arch: Architecture, scheme: Scheme, name: str) -> None:
        """``name`` is the module's name, such as ``blocks.0.attn``."""
        super().__init__(arch)
        width = arch.attention_dim
        self.qkv = IntegerLinear(arch.embed_dim, 3 * width, scheme.for_layer(f"{name}.qkv"))
        self.proj = IntegerLinear(width, arch.embed_dim, scheme.for_layer(f"{name}.proj"))
        self.product = AttentionProduct(scheme.integer_attention)
        self._float_format = OutputFormat(torch.float32)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedAttention:
        super()._apply(fn, recurse)
        self._float_format = self._make_float_format(self.qkv.weight.device)
        return self

    def forward(
        self, x: Tensor, encoding: PositionEncoding, num_queries: int | None = None
    ) -> Tensor:
        return self.integer_forward(self.qkv.quantize_input(x), encoding, num_queries)

    def integer_forward(
        self,
        x: Tensor,
        encoding: PositionEncoding,
        num_queries: int | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Apply to uint8 ``[B, T, embed_dim]``; see :meth:`IntegerLinear.integer_forward`."""
        out = self._format(encoding)
        q, k, v = self.split(self.qkv.integer_forward(x, out), encoding)
        scale = 1.0 if out.dtype == torch.bfloat16 else None
        mixed = self.product.forward(
            q[:, :, :num_queries], k, v, self.bias(encoding, num_queries), scale
        )
        return self.proj.integer_forward(
            self.proj.quantize_norm_output(self.norm, mixed), residual=residual
        )

    def _format(self, encoding: PositionEncoding) -> OutputFormat:
        """Return the format of q, k and v: int8 unless they are normed or rotated first; bfloat16
        with the scale of the scores folded into q."""
        normed = isinstance(self.q_norm, nn.LayerNorm)
        if self.product.integer and not (normed or encoding.has_rope):
            return self.product.output_format(self.num_heads * self.head_dim)
        if self.product.integer or normed:
            return OutputFormat(torch.float32)
        return OutputFormat(torch.float32) if opaque.exporting() else self._float_format

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype in which the products of attention are multiplied on a device."""
        if self.product.integer:
            return self.product.select(device).attention_dtype(device)
        return torch.float32 if isinstance(self.q_norm, nn.LayerNorm) else attention_dtype(device)

    def _make_float_format(self, device: torch.device) -> OutputFormat:
        if device.type == "meta" or attention_dtype(device) == torch.float32:
            return OutputFormat(torch.float32)
        scale = torch.ones(3, self.num_heads * self.head_dim, dtype=torch.float32, device=device)
        scale[0] = self.head_dim**0.5
        return OutputFormat(torch.bfloat16, scale.flatten())


class QuantizedMlp(Mlp):
    """MLP with integer linear layers.

    The hidden activations stay 8-bit integers if the kernel of ``fc1`` can apply the
    nonlinearity.
    """

    fc1: IntegerLinear
    fc2: IntegerLinear

    def __init__(self, mlp: Mlp, scheme: Scheme, name: str) -> None:
        """Take shape and norm from the float ``mlp``; ``name`` is the module's name."""
        first, second = cast(nn.Linear, mlp.fc1), cast(nn.Linear, mlp.fc2)
        width, hidden = second.out_features, second.in_features
        super().__init__(width, hidden, mlp.activation, gated=mlp.gated, norm=mlp.norm)
        self.fc1 = IntegerLinear(width, first.out_features, scheme.for_layer(f"{name}.fc1"))
        self.fc2 = IntegerLinear(hidden, width, scheme.for_layer(f"{name}.fc2"))

    def forward(self, x: Tensor) -> Tensor:
        return self.integer_forward(self.fc1.quantize_input(x))

    def integer_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply to uint8 ``[B, T, C]``; see :meth:`IntegerLinear.integer_forward`."""
        return self.fc2.integer_forward(self._hidden(x), residual=residual)

    def _hidden(self, x: Tensor) -> Tensor:
        fused = self.activation in ("gelu", "gelu_tanh") and isinstance(self.norm, nn.Identity)
        if self.gated or not fused:
            return self.fc2.quantize_input(self.activate(self.fc1.integer_forward(x)))
        qparams = self.fc2.kernel_qparams
        gelu: Literal["none", "tanh"] = "tanh" if self.activation == "gelu_tanh" else "none"
        out = OutputFormat(torch.uint8, qparams.scale, qparams.zero_point, qparams.qtype.qmax, gelu)
        return self.fc1.integer_forward(x, out)


class QuantizedPool(AttentionPool):
    """Attention pooling with integer linear layers; its attention is in floating point."""

    kv: IntegerLinear
    proj: IntegerLinear
    mlp: QuantizedMlp

    def __init__(self, arch: Architecture, scheme: Scheme, name: str) -> None:
        super().__init__(arch)
        width = arch.embed_dim
        self.kv = IntegerLinear(width, 2 * width, scheme.for_layer(f"{name}.kv"))
        self.proj = IntegerLinear(width, width, scheme.for_layer(f"{name}.proj"))
        self.mlp = QuantizedMlp(self.mlp, scheme, f"{name}.mlp")


class QuantizedBlock(Block):
    """Transformer block with integer layers; the residual stream is float32."""

    attn: QuantizedAttention
    mlp: QuantizedMlp

    def __init__(self, arch: Architecture, scheme: Scheme, name: str) -> None:
        super().__init__(arch)
        self.attn = QuantizedAttention(arch, scheme, f"{name}.attn")
        self.mlp = QuantizedMlp(self.mlp, scheme, f"{name}.mlp")

    def forward(
        self, x: Tensor, encoding: PositionEncoding, num_queries: int | None = None
    ) -> Tensor:
        """As :meth:`dfq.vit.Block.forward`; ``x`` may be overwritten."""
        normed = self.attn.qkv.quantize_norm_output(self.norm1, x)
        x = self.attn.integer_forward(normed, encoding, num_queries, x[:, :num_queries])
        return self.mlp.integer_forward(self.mlp.fc1.quantize_norm_output(self.norm2, x), x)


class QuantizedViT(ViT):
    """ViT on integer arithmetic, called like the float one on normalized images.

    ``settings`` define the quantization scheme, ``preprocessing`` the normalization of images.
    Inference only: there are no gradients.  ``graphs``: CUDA graphs of batches that repeat, where
    they are enabled (:func:`dfq.load`).
    """

    def __init__(
        self, arch: Architecture, settings: QuantizationSettings, preprocessing: Preprocessing
    ) -> None:
        super().__init__(arch)
        self.settings, self.preprocessing = settings, preprocessing
        self.graphs = GraphCache()
        self.scheme = scheme = Scheme(settings)
        scheme.check_layers(arch)
        self.blocks = nn.ModuleList(
            QuantizedBlock(arch, scheme, f"blocks.{i}") for i in range(arch.depth)
        )
        embed_scheme = scheme.for_layer("patch_embed")
        self.patch_embed = IntegerPatchEmbed(arch.grid.patch_values, arch.embed_dim, embed_scheme)
        self.set_normalization()
        if arch.pool == "map":
            self.attn_pool = QuantizedPool(arch, scheme, "attn_pool")
        if arch.num_classes:
            self.head = IntegerLinear(arch.head_inputs, arch.num_classes, scheme.for_layer("head"))
        self.eval().requires_grad_(False)

    def set_normalization(self) -> None:
        """Set the patch embedding's mean and standard deviation from the preprocessing."""
        assert isinstance(self.patch_embed, IntegerPatchEmbed)
        values = self.preprocessing.level_mean, self.preprocessing.level_std
        mean, std = (channel_values(v, self.arch.grid, self.prefix.device) for v in values)
        self.patch_embed.set_normalization(mean, std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return float32 logits of normalized images ``[B, C, H, W]`` of the model's size.

        Values outside the input range (pixels from 0 to 255) are clamped to it.  An image with a
        NaN or infinite value has NaN logits.

        Raises:
            DataError: the images have another size or dtype.
        """
        if opaque.tracing() or not self.graphs.enabled:
            return super().forward(images)
        return self.graphs(super().forward, images, self._captured_objects)

    def _captured_objects(self) -> list[object] | None:
        """Return all objects whose replacement makes a captured graph stale; None if a graph would
        not run what the modules do: in training mode, with hooks or replaced ``forward`` methods.
        """
        if self.training:
            return None
        found: list[object] = []
        modules: list[nn.Module] = [self]
        while modules:
            module = modules.pop()
            found += module._parameters.values()
            found += module._buffers.values()
            if isinstance(module, IntegerLinear):
                found.append(module.packed_identity)
            for child in module._modules.values():
                if child is None:
                    continue
                if child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                    return None
                found.append(child)
                modules.append(child)
        return found

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedViT:
        check_types(fn)
        self.graphs.clear()
        result: QuantizedViT = super()._apply(fn, recurse)
        return result

    def train(self, mode: bool = True) -> QuantizedViT:
        self.graphs.clear()
        super().train(mode)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.graphs.clear()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def forward_sparse(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """As :meth:`dfq.vit.ViT.forward_sparse`, on normalized patches."""
        with without_autocast(self.prefix.device):
            logits = super().forward_sparse(patches, positions)
        return logits + (patches - patches).sum((1, 2), dtype=logits.dtype)[:, None]

    @property
    def backend(self) -> str:
        """Name of the backend in use; names, separated by commas, if layers differ."""
        names = {layer.prepare()[0].NAME for layer in self._linears()}
        return ", ".join(sorted(names))

    def max_weight(self) -> int:
        """Largest magnitude of the integers that linear layers multiply."""
        return max(layer.max_weight() for layer in self._linears())

    def set_backend(self, name: str | None) -> QuantizedViT:
        """Select the backend: ``"onednn"``, ``"int_mm"``, ``"float"``, ``"reference"``, or None for
        the first of them that is exact here and not slower than a later one.

        Raises:
            SettingError: no such backend, or it is not exact here.
        """
        runtime.select(self.prefix.device, name, KernelRequirements(max_weight=0))
        for layer in self._linears() if name is not None else ():
            layer.select(name)
        self.graphs.clear()
        for layer in self._linears():
            layer.backend = name
            layer.reset()
        for product in self.attention_products():
            product.backend = name
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile everything but the integer kernels with ``torch.compile``.

        The first call with a new shape takes tens of seconds.  Arguments are those of
        ``torch.compile``.

        Raises:
            SettingError: there is no C++ compiler.
        """
        if self.prefix.device.type == "cpu" and opaque.compiler() is None:
            raise SettingError(
                f"Compiling takes a C++ compiler ({', '.join(opaque.COMPILERS)}), and none is on "
                f"the PATH. Install one, or run the model as it is."
            )
        super().compile(*args, **{"fullgraph": True, **kwargs})

    @property
    def compiled(self) -> bool:
        """Whether :meth:`compile` has been called."""
        return self._compiled_call_impl is not None

    def linear_layers(self) -> dict[str, IntegerLinear]:
        """Return the linear layers by name, in the order of the forward pass."""
        names = layers(self.arch)
        return {name: cast(IntegerLinear, self.get_submodule(name)) for name in names}

    def _linears(self) -> list[IntegerLinear]:
        return [m for m in self.modules() if isinstance(m, IntegerLinear)]

    def attention_products(self) -> list[AttentionProduct]:
        """Return the attention products of all blocks."""
        return [m for m in self.modules() if isinstance(m, AttentionProduct)]

    def activation_qparams(self) -> dict[str, QParams]:
        """Return the qparams of every quantized activation, by name."""
        qparams = {name: layer.input_qparams for name, layer in self.linear_layers().items()}
        if self.scheme.integer_attention:
            for i, product in enumerate(self.attention_products()):
                for suffix, scale in zip(ATTENTION_INPUTS, product.scales.tolist(), strict=True):
                    qparams[f"blocks.{i}.{suffix}"] = QParams(scale, 0, INT8)
        return qparams


@torch.no_grad()
def quantize_vit(
    vit: ViT,
    calibration: Calibration,
    preprocessing: Preprocessing,
    settings: QuantizationSettings,
    advance: Callable[[int], None] | None = None,
) -> QuantizedViT:
    """Quantize a float model, which is not modified.

    The callback ``advance`` is called with 1 after every layer.
    """
    quantized, names = _zeros_like(vit, settings, preprocessing), layers(vit.arch)
    for name in names:
        linear = vit.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        target = cast(IntegerLinear, quantized.get_submodule(name))
        if isinstance(target, IntegerPatchEmbed):
            _fill_patch_embed(target, linear)
        else:
            _fill(
                target,
                linear.weight,
                linear.bias,
                calibration.qparams[name],
                calibration.statistics[name],
                settings,
            )
        if advance is not None:
            advance(1)
    if quantized.scheme.integer_attention:
        for i, product in enumerate(quantized.attention_products()):
            scales = [calibration.qparams[f"blocks.{i}.{s}"].scale for s in ATTENTION_INPUTS]
            product.assign(scales)
    return quantized


def _zeros_like(
    vit: ViT, settings: QuantizationSettings, preprocessing: Preprocessing
) -> QuantizedViT:
    """Return a quantized model with the float model's norms and embeddings and zero weights.

    Built on the meta device, which skips random initialization.
    """
    device = vit.prefix.device
    with torch.device("meta"):
        quantized = QuantizedViT(vit.arch, settings, preprocessing)
    state = {k: torch.zeros_like(v, device=device) for k, v in quantized.state_dict().items()}
    linears = layers(vit.arch)
    for name, value in vit.state_dict().items():
        if name in state and name.rpartition(".")[0] not in linears:
            state[name] = value.clone()
    quantized.load_state_dict(state, assign=True)
    quantized.set_normalization()
    return quantized.to(device)


def _fill_patch_embed(target: IntegerPatchEmbed, linear: nn.Linear) -> None:
    weight = linear.weight / target.std
    scales = rounding.search_scales(weight, target.scheme)
    integers = rounding.round_nearest(weight, scales, target.scheme.weight)
    mean = target.mean
    exact = torch.where((mean >= 0) & (mean <= 1), mean, RANGE_CENTER)
    bias = linear.bias + weight @ (exact - mean) - scales.dequantize(integers) @ exact
    target.assign(integers, scales, bias, PIXEL_QPARAMS)


def _fill(
    target: IntegerLinear,
    weight: Tensor,
    bias: Tensor,
    qparams: QParams,
    statistics: InputStatistics,
    settings: QuantizationSettings,
) -> None:
    hessian, qtype = statistics.hessian, target.scheme.weight
    importance = None if hessian is None else hessian.diagonal()
    scales = rounding.search_scales(weight, target.scheme, importance)
    if hessian is not None:
        integers = rounding.round_gptq(weight, scales, qtype, hessian, settings.damping)
    else:
        integers = rounding.round_nearest(weight, scales, qtype)
    if settings.bias_correction:
        dequantized = scales.dequantize(integers)
        bias = bias + rounding.bias_correction(weight, dequantized, statistics.mean)
    target.assign(integers, scales, bias, qparams)
