"""Integer linear layers and integer attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq import runtime
from dfq.errors import SettingError
from dfq.quantization.rounding import WeightScales
from dfq.quantization.scheme import LayerScheme
from dfq.runtime import Backend, opaque, reference
from dfq.runtime.packing import pack_bits
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat
from dfq.runtime.qtype import INT8, QParams
from dfq.runtime.weights import StoredWeight, stored_shape
from dfq.vit.modules import attend, merge_heads


def check_types(fn: Callable[..., Any]) -> None:
    """Raise :class:`SettingError` if a function for ``nn.Module._apply`` changes dtypes."""
    if fn(torch.zeros(1, dtype=torch.float32, device="cpu")).dtype != torch.float32:
        raise SettingError(
            "A quantized model cannot change its type: its products are on 8-bit integers, and the "
            "kernels choose the types between them. Leave out half(), bfloat16(), double() and "
            "to(dtype)."
        )


class IntegerLinear(opaque.OpaqueModule):
    """Linear layer with integer weights and integer input.

    Buffers: ``weight``, int8 ``[out, in]`` for 8 bits, else packed uint8 ``[out, ceil(in * bits /
    8)]`` (:func:`dfq.runtime.packing.pack_bits`); ``group_scale``, uint8 ``[out, ceil(in /
    group)]``, with groups only; ``weight_scale`` and ``bias``, float32 ``[out]``; ``input_scale``,
    float32, and ``input_zero_point``, int32, scalars.  The backend's packed copy of the weight is
    built at the first call and never copied, pickled or part of ``state_dict``.
    """

    weight: Tensor
    weight_scale: Tensor
    group_scale: Tensor
    bias: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, in_features: int, out_features: int, scheme: LayerScheme) -> None:
        super().__init__()
        self.scheme, self.bits, self.group = scheme, scheme.bits, scheme.group
        self.in_features, self.out_features = in_features, out_features
        self.backend: str | None = None
        shape, dtype = stored_shape(out_features, in_features, self.bits)
        self.register_buffer("weight", torch.zeros(shape, dtype=dtype))
        if self.group:
            groups = -(-in_features // self.group)
            ones = torch.ones(out_features, groups, dtype=torch.uint8)
            self.register_buffer("group_scale", ones)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32))
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32))
        self._input_qparams = QParams(1.0, 0, scheme.input)
        self._largest: int | None = None
        self._prepacked: tuple[Any, ...] | None = None
        self._packed_norm: tuple[nn.LayerNorm, object] | None = None

    def assign(
        self, integers: Tensor, scales: WeightScales, bias: Tensor, qparams: QParams
    ) -> None:
        """Set the integer weights int8 ``[out, in]``, their scales, the bias ``[out]`` and the
        qparams of the input."""
        self.weight.copy_(integers if self.bits == 8 else pack_bits(integers, self.bits))
        self.weight_scale.copy_(scales.channel)
        if scales.group is not None:
            self.group_scale.copy_(scales.group)
        self.bias.copy_(bias)
        self.input_scale.fill_(qparams.scale)
        self.input_zero_point.fill_(qparams.zero_point)
        self._read_input_qparams()
        self._largest = None
        self.reset()

    def integers(self) -> Tensor:
        """Return the weights in units of ``weight_scale``, int8 ``[out, in]``."""
        return self.stored.integers

    @property
    def stored(self) -> StoredWeight:
        """Weights in the form that checkpoints store."""
        group_scale = self.group_scale if self.group else None
        return StoredWeight(self.weight, self.bits, self.in_features, group_scale, self.group)

    def dequantized(self) -> Tensor:
        """Return the dequantized weights, float32 ``[out, in]``."""
        return self.integers().float() * self.weight_scale[:, None]

    @property
    def input_qparams(self) -> QParams:
        """Qparams of the input, as Python numbers: buffers cannot be read while tracing."""
        return self._input_qparams

    @property
    def kernel_qparams(self) -> QParams:
        """Qparams of the uint8 input that kernels take: :attr:`input_qparams`, as unsigned
        integers."""
        return self._input_qparams.unsigned

    def _read_input_qparams(self) -> None:
        if not self.input_scale.is_meta:
            scale, zero_point = float(self.input_scale), int(self.input_zero_point)
            self._input_qparams = QParams(scale, zero_point, self.scheme.input)

    def reset(self) -> None:
        """Drop the backend's packed copies of weight and norm; the next call builds them again."""
        self._prepacked = self._packed_norm = None

    @property
    def packed_identity(self) -> object:
        """Object that is another one whenever the packed weight was built anew; None without."""
        return self._prepacked

    def prepare(self) -> tuple[Any, LinearParams, object]:
        """Return the backend, the layer's parameters and the backend's packed weight."""
        if opaque.exporting():
            params = self._params()
            return reference, params, reference.prepack(params)
        if self._prepacked is None:
            params = self._params()
            if self._largest is None:
                self._largest = params.weight.largest
            kernels = self.select(self.backend)
            packed = kernels.prepack(params)
            self._prepacked = (kernels, self._params(), packed)  # without unpacked integers
        return self._prepacked

    def select(self, backend: str | None) -> Backend:
        """Return the named backend, or the first one that is exact for this layer.

        Raises:
            SettingError: no backend has that name, or it is not exact here.
        """
        return runtime.select(self.weight.device, backend, self.requirements())

    def requirements(self) -> KernelRequirements:
        """Return the operands for which a kernel must be exact."""
        return KernelRequirements(
            self.max_weight(), self.scheme.input.bits, self.in_features, self.out_features
        )

    def max_weight(self) -> int:
        """Return the largest magnitude of :meth:`integers`."""
        if self._largest is None:
            self._largest = self.stored.largest
        return self._largest

    def _params(self) -> LinearParams:
        return LinearParams(self.stored, self.weight_scale, self.bias, self.kernel_qparams)

    @property
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """(scale, shift) ``[in]`` applied to the input before quantization, or None."""
        return None

    def apply_affine(self, x: Tensor) -> Tensor:
        """Apply :attr:`affine` to the float model's input ``[..., in]``."""
        return x if self.affine is None else x.float() * self.affine[0] + self.affine[1]

    def invert_affine(self, x: Tensor) -> Tensor:
        """Invert :meth:`apply_affine`."""
        return x if self.affine is None else (x - self.affine[1]) / self.affine[0]

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantize the float model's input ``[..., in]`` to uint8."""
        kernels = reference if opaque.tracing() else self.prepare()[0]
        y: Tensor = kernels.quantize(x, self.kernel_qparams, self.affine)
        return y

    def quantize_norm_output(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Apply a norm to float ``[..., in]`` and quantize its output to uint8."""
        if not isinstance(norm, nn.LayerNorm) or opaque.tracing():
            return self.quantize_input(norm(x))
        kernels, params, _ = self.prepare()
        if self._packed_norm is None or self._packed_norm[0] is not norm:
            self._packed_norm = norm, kernels.prepack_norm(norm, params.input)
        y: Tensor = kernels.quantize_norm(x, self._packed_norm[1])
        return y

    def fake_quantize_input(self, x: Tensor) -> Tensor:
        """Quantize and dequantize the input, float32 ``[..., in]``."""
        qparams = self.kernel_qparams
        return (self.quantize_input(x).float() - qparams.zero_point) * qparams.scale

    def integer_forward(
        self, x: Tensor, out: OutputFormat | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Apply the layer to uint8 ``[..., in]``; returns ``[..., out]`` in the format ``out``.

        The default format is float32.  ``residual`` is added to float32 output and may be
        overwritten.
        """
        out = out or OutputFormat()
        if opaque.compiling():
            y = opaque.linear(self, x, out)
            return y if residual is None else y + residual
        kernels, params, packed = self.prepare()
        output: Tensor = kernels.linear(x, params, packed, out, residual)
        return output

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Apply the layer to float ``[..., in]``; returns ``[..., out]`` of ``dtype``."""
        return self.integer_forward(self.quantize_input(x), OutputFormat(dtype))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, input={self.scheme.input}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_largest": None, "_prepacked": None, "_packed_norm": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_input_qparams()
        self._largest = None
        self.reset()

    def _apply(self, fn: Any, recurse: bool = True) -> IntegerLinear:
        check_types(fn)
        self.reset()
        super()._apply(fn, recurse)
        return self


class IntegerPatchEmbed(IntegerLinear):
    """Patch embedding whose input is rounded to the 256 levels of a pixel.

    Takes normalized patches.  The normalization's mean and standard deviation are folded into
    weight and bias, so the input's qparams need no calibration: scale 1/255, zero point 0.
    """

    mean: Tensor
    std: Tensor

    def set_normalization(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of each input value, float32 ``[in]``."""
        self.register_buffer("mean", mean.to(self.weight.device), persistent=False)
        self.register_buffer("std", std.to(self.weight.device), persistent=False)

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        return self.std, self.mean


class AttentionProduct(opaque.OpaqueModule):
    """The two matrix products of attention, on 8-bit integers or in floating point."""

    scales: Tensor

    def __init__(self, integer: bool) -> None:
        """With ``integer``, the buffer ``scales`` holds the scales of q, k and v."""
        super().__init__()
        self.integer = integer
        self.backend: str | None = None
        self._scales = (1.0, 1.0, 1.0)
        if integer:
            self.register_buffer("scales", torch.ones(3, dtype=torch.float32))

    def assign(self, scales: Sequence[float]) -> None:
        """Set the scales of q, k and v."""
        self.scales.copy_(torch.tensor(scales, dtype=torch.float32, device="cpu"))
        self._read_scales()

    def _read_scales(self) -> None:
        if self.integer and not self.scales.is_meta:
            q, k, v = self.scales.tolist()
            self._scales = (q, k, v)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_scales()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of q, k and v ``[B, H, T, D]``; returns float32 ``[B, T, H * D]``.

        Scores are multiplied by ``scale`` (``D ** -0.5`` by default), then ``bias`` is added.
        With ``integer``, q, k and v are int8, or are quantized here.  The batch is processed in
        tiles whose scores fit in the cache.
        """
        b, h, t, d = q.shape
        if opaque.compiling():
            return opaque.attention(self, q, k, v, bias, scale)
        kernels = runtime.get("reference") if opaque.exporting() else self.select(q.device)
        max_tile_scores = kernels.max_tile_scores(q.device)
        step = 1 if opaque.exporting() else max(1, max_tile_scores // max(1, h * t * k.shape[2]))
        scale = d**-0.5 if scale is None else scale
        mix = self._integer_mix(kernels, scale) if self.integer else partial(attend, scale=scale)
        if opaque.exporting():
            return merge_heads(mix(q, k, v, bias)).float()
        mixed = torch.empty(b, t, h, d, device=q.device, dtype=torch.float32)
        for start in range(0, b, step):
            tile = slice(start, start + step)
            tile_bias = bias if bias is None or len(bias) == 1 else bias[tile]
            mixed[tile] = mix(q[tile], k[tile], v[tile], tile_bias).transpose(1, 2)
        return mixed.flatten(2)

    def select(self, device: torch.device) -> Backend:
        """Return the chosen backend, or the first one that is exact on a device."""
        return runtime.select(device, self.backend, KernelRequirements(max_weight=0))

    def _integer_mix(
        self, kernels: Backend, scale: float
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
        scales = self._scales
        score_scale = scales[0] * scales[1] * scale

        def mix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            if q.is_floating_point():
                pairs = zip((q, k, v), scales, strict=True)
                q, k, v = (kernels.quantize(x, QParams(scale, 0, INT8)) for x, scale in pairs)
            return kernels.attention(q, k, v, score_scale, bias) * scales[2]

        return mix

    def output_format(self, width: int) -> OutputFormat:
        """Return the int8 format of a layer that writes q, k and v, ``width`` channels each."""
        return OutputFormat(torch.int8, self.scales.repeat_interleave(width))
