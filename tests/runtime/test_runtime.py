"""The integer kernels against the reference that defines them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from exported_models import images_for, quantized, spread
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfq import device, runtime
from dfq.errors import SettingError
from dfq.quantization.layers import IntegerLinear
from dfq.runtime import elementwise, float_gemm, onednn, reference, registry
from dfq.runtime.params import KernelRequirements, LinearParams, OutputFormat
from dfq.runtime.qtype import QParams, QType
from dfq.runtime.weights import StoredWeight

CPU = torch.device("cpu")
WITHOUT_VNNI = KernelRequirements(max_weight=onednn.MAX_WEIGHT_WITHOUT_VNNI)

needs_onednn = pytest.mark.skipif(
    onednn.unsupported_reason(CPU, WITHOUT_VNNI) is not None,
    reason="oneDNN's integers are not exact here",
)

every_backend = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(kernels, id=name, marks=pytest.mark.skipif(bool(reason), reason=reason or ""))
        for name in runtime.backends()
        for kernels in [runtime.get(name)]
        for reason in [kernels.unsupported_reason(CPU, WITHOUT_VNNI)]
        if kernels is not reference
    ],
)
"""Every backend that is compared with the reference."""


def largest_exact(kernels: Any) -> int:
    """Largest magnitude of the weights for which a backend is exact here."""
    exact = kernels.unsupported_reason(CPU, KernelRequirements()) is None
    return 127 if exact else onednn.MAX_WEIGHT_WITHOUT_VNNI


def make(
    kernels: Any, rows: int, inputs: int, outputs: int, seed: int, kind: str
) -> tuple[Tensor, LinearParams]:
    largest = largest_exact(kernels)
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (rows, inputs), generator=g, dtype=torch.uint8)
    weight = torch.randint(-largest, largest + 1, (outputs, inputs), generator=g, dtype=torch.int8)
    scale, bias = torch.rand(outputs, generator=g) * 0.01 + 1e-5, torch.randn(outputs, generator=g)
    if kind == "extreme":
        x, weight = torch.full_like(x, 255), torch.full_like(weight, largest)
        weight[::2] = -largest
    elif kind == "huge":
        scale = scale * 1e6
    elif kind == "tiny":
        scale, bias = scale * 1e-12, bias * 1e-9
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    zero_point = 0 if kind == "zero" else 117
    return x, params_of(weight, scale, bias, zero_point)


def params_of(weight: Tensor, scale: Tensor, bias: Tensor, zero_point: int) -> LinearParams:
    stored = StoredWeight(weight, 8, weight.shape[1])
    return LinearParams(stored, scale, bias, QParams(0.037, zero_point))


def both(kernels: Any, x: Tensor, params: LinearParams, out: OutputFormat) -> tuple[Tensor, Tensor]:
    fast = kernels.linear(x, params, kernels.prepack(params), out)
    return fast, reference.linear(x, params, reference.prepack(params), out)


@every_backend
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["random", "extreme", "huge", "tiny", "zero"]),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_float_outputs_agree_within_four_units_in_the_last_place(
    kernels: Any, rows: int, inputs: int, outputs: int, seed: int, kind: str
) -> None:
    x, params = make(kernels, rows, inputs, outputs, seed, kind)
    fast, exact = both(kernels, x, params, OutputFormat())
    product = (exact - params.bias).abs()
    bound = 4 * torch.finfo(torch.float32).eps * (product + params.bias.abs())
    assert bool(((fast - exact).abs() <= bound).all())


@every_backend
@given(
    seed=st.integers(0, 999),
    inputs=st.integers(1, 200),
    gelu=st.sampled_from([None, "none", "tanh"]),
    zero_point=st.integers(0, 255),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_uint8_outputs_agree_within_one_level(
    kernels: Any, seed: int, inputs: int, gelu: str | None, zero_point: int
) -> None:
    x, params = make(kernels, 7, inputs, 33, seed, "random")
    out = OutputFormat(torch.uint8, 0.11, zero_point, gelu=gelu)  # type: ignore[arg-type]
    fast, exact = both(kernels, x, params, out)
    assert fast.dtype == exact.dtype == torch.uint8
    assert int((fast.int() - exact.int()).abs().max()) <= 1


@every_backend
def test_bfloat16_outputs_agree_within_one_rounding(
    kernels: Any,
) -> None:
    x, params = make(kernels, 5, 64, 48, 0, "random")
    fast, exact = both(kernels, x, params, OutputFormat(torch.bfloat16))
    torch.testing.assert_close(fast, exact, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backend", sorted(runtime.backends()))
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8), (1, 8), (2, 3, 8)])
def test_shapes_hold_also_for_empty_batches(backend: str, shape: tuple[int, ...]) -> None:
    if (reason := runtime.get(backend).unsupported_reason(CPU, WITHOUT_VNNI)) is not None:
        pytest.skip(reason)
    _, params = make(reference, 1, 8, 5, 0, "random")
    kernels = runtime.get(backend)
    x = torch.zeros(shape, dtype=torch.uint8)
    y = kernels.linear(x, params, kernels.prepack(params), OutputFormat())
    assert y.shape == (*shape[:-1], 5)


def test_reference_sums_are_exact_integers() -> None:
    x, params = make(reference, 3, 4096, 6, 0, "extreme")
    sums = (x.long() - params.input.zero_point) @ params.weight.integers.long().T
    expected = sums.float() * (params.weight_scale * params.input.scale) + params.bias
    actual = reference.linear(x, params, reference.prepack(params), OutputFormat())
    assert torch.equal(actual, expected)


@given(
    inputs=st.integers(1, 3000),
    zero_point=st.integers(0, 255),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_float_sums_are_exact_for_the_largest_activations(
    inputs: int, zero_point: int, bits: int, seed: int
) -> None:
    """Terms of one sign, each as large as can be, give the largest sums."""
    g = torch.Generator().manual_seed(seed)
    largest = 2 ** (bits - 1) - 1
    weight = torch.randint(-largest, largest + 1, (5, inputs), generator=g, dtype=torch.int8)
    weight[0] = largest
    packed = float_gemm.prepack(params_of(weight, torch.ones(5), torch.zeros(5), zero_point))
    assert isinstance(packed, float_gemm.PackedWeight)
    start = 0
    for part in packed.parts:
        integers = weight[:, start : start + part.shape[1]].long()
        start += part.shape[1]
        x = torch.where((integers > 0) == (zero_point < 128), 255, 0) - zero_point
        exact = (x * integers).sum(1)
        assert torch.equal((x.float() @ part.T).diagonal().long(), exact)
        assert int(exact.abs().max()) <= float_gemm.EXACT
    assert start == inputs


def test_weights_of_vits_are_multiplied_in_one_part() -> None:
    """3072 inputs of normally distributed weights, as in ViT-B."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(768, 3072, generator=g) * 127 / 4).round().clamp(-127, 127)
    assert float_gemm.exact_inputs(weight.to(torch.int8), 117, 255) == 3072


def test_quantize_rounds_half_to_even_and_clips() -> None:
    x = torch.tensor([-1e9, -0.5, 0.5, 1.5, 2.5, 1e9])
    assert reference.quantize(x, QParams(1.0, 10)).tolist() == [0, 10, 10, 12, 12, 255]


def heads(tokens: int, seed: int, kind: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """int8 q, k and v ``[2, 3, tokens, 16]`` and the scale of their scores."""
    g = torch.Generator().manual_seed(seed)
    floats = [torch.randn(2, 3, tokens, 16, generator=g) * 40 for _ in range(3)]
    if kind == "equal":
        floats[0] = torch.zeros_like(floats[0])
    if kind == "extreme":
        floats = [x.sign() * 127 for x in floats]
    scale = 2e-3 if kind == "peaked" else 2e-4
    q, k, v = (x.round().clamp(-127, 127).to(torch.int8) for x in floats)
    return q, k, v, scale


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = (q.double() @ k.double().transpose(-2, -1)) * scale
    shares = ((scores - scores.amax(-1, keepdim=True)).exp() * 255).round()
    return (shares @ v.double()) / shares.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["normal", "peaked", "equal", "extreme"])
def test_integer_attention_is_exact_attention_on_integers(kind: str) -> None:
    operands = heads(9, 0, kind)
    actual = reference.attention(*operands).double()
    torch.testing.assert_close(actual, exact_attention(*operands), rtol=0, atol=0.02)


def test_flat_rows_of_attention_keep_all_levels() -> None:
    """With one scale for all rows each of 300 equal shares would be 1 of 255, or 0."""
    operands = heads(300, 0, "equal")
    mean = operands[2].double().mean(-2, keepdim=True).expand(-1, -1, 300, -1)
    actual = reference.attention(*operands).double()
    torch.testing.assert_close(actual, mean, rtol=0, atol=1e-4)


@needs_onednn
@given(
    tokens=st.integers(1, 60),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "peaked", "equal", "extreme"]),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_fast_integer_attention_is_as_exact_as_bfloat16(tokens: int, seed: int, kind: str) -> None:
    *integers, scale = operands = heads(tokens, seed, kind)
    exact = reference.attention(*operands)
    q, k, v = (x.bfloat16() for x in integers)
    scores = (q @ k.transpose(-2, -1)) * scale
    plain = (scores.softmax(-1) @ v).float() - exact
    error = elementwise.attention(*operands).float() - exact
    assert float(error.norm()) <= 2 * float(plain.norm()) + 0.005 * float(exact.norm())


@needs_onednn
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 130),
    seed=st.integers(0, 999),
    zero_point=st.integers(0, 255),
    size=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    bits=st.integers(4, 8),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_quantized_norms_agree_within_one_level(
    rows: int, width: int, seed: int, zero_point: int, size: float, bits: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    norm = torch.nn.LayerNorm(width).requires_grad_(False)
    norm.weight.copy_(torch.randn(width, generator=g))
    norm.bias.copy_(torch.randn(width, generator=g))
    x = torch.randn(2, rows, width, generator=g) * size
    by = QParams(0.013, min(zero_point, 2**bits - 1), QType(bits))
    fast = elementwise.quantize_norm(x, elementwise.prepack_norm(norm, by))
    exact = reference.quantize_norm(x, reference.prepack_norm(norm, by))
    assert fast.dtype == torch.uint8
    assert int(exact.max()) < 2**bits
    assert int(fast.max()) < 2**bits
    assert int((fast.int() - exact.int()).abs().max()) <= 1


@needs_onednn
@given(
    x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    scale=st.floats(1e-6, 1e6),
    zero_point=st.integers(0, 255),
    bits=st.integers(4, 8),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_quantizing_agrees_within_one_level(
    x: list[float], scale: float, zero_point: int, bits: int
) -> None:
    values = torch.tensor(x)
    by = QParams(scale, min(zero_point, 2**bits - 1), QType(bits))
    fast, exact = elementwise.quantize(values, by).int(), reference.quantize(values, by).int()
    assert int((fast - exact).abs().max()) <= 1
    assert int(fast.max()) < 2**bits


@needs_onednn
@given(seed=st.integers(0, 999), zero_point=st.integers(0, 255))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_quantizing_an_affine_agrees_within_one_level(seed: int, zero_point: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, factor, summand = (torch.randn(n, generator=g) for n in ((3, 5, 7), (7,), (7,)))
    affine, by = (factor, summand), QParams(0.013, zero_point)
    fast = elementwise.quantize(x, by, affine).int()
    exact = reference.quantize(x, by, affine).int()
    assert torch.equal(exact, reference.quantize(x * factor + summand, by).int())
    assert int((fast - exact).abs().max()) <= 1


@every_backend
@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24), (0, 3, 24)], ids=str)
def test_residuals_are_added_last(kernels: Any, shape: tuple[int, ...]) -> None:
    _, params = make(kernels, 1, 24, 10, 0, "random")
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    residual = torch.randn(*shape[:-1], 10)
    exact = reference.linear(x, params, reference.prepack(params), OutputFormat(), residual.clone())
    fast = kernels.linear(x, params, kernels.prepack(params), OutputFormat(), residual)
    torch.testing.assert_close(fast, exact, rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_outputs_are_written_in_units_of_the_scale(
    kernels: Any, each: bool, dtype: torch.dtype
) -> None:
    x, params = make(kernels, 5, 24, 10, 0, "random")
    scale = torch.rand(10, generator=torch.Generator().manual_seed(1)) + 0.1 if each else 0.25
    fast, exact = both(kernels, x, params, OutputFormat(dtype, scale))
    _, plain = both(kernels, x, params, OutputFormat())
    torch.testing.assert_close(exact, (plain / scale).to(dtype))
    assert fast.dtype == dtype
    torch.testing.assert_close(
        fast, exact, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5
    )


@every_backend
@given(inputs=st.integers(1, 130), outputs=st.integers(1, 70), seed=st.integers(0, 999))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_int8_outputs_with_a_scale_each_agree_within_one_level(
    kernels: Any, inputs: int, outputs: int, seed: int
) -> None:
    x, params = make(kernels, 5, inputs, outputs, seed, "random")
    scale = torch.rand(outputs, generator=torch.Generator().manual_seed(seed)) + 0.01
    fast, exact = both(kernels, x, params, OutputFormat(torch.int8, scale))
    assert fast.dtype == exact.dtype == torch.int8
    assert int((fast.int() - exact.int()).abs().max()) <= 1


def test_unknown_backends_are_named() -> None:
    with pytest.raises(SettingError, match=r"backend is 'fast'; it is one of onednn, .*reference"):
        runtime.select("cpu", "fast")


def test_where_products_saturate_full_range_weights_are_multiplied_as_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "_worst_product_is_exact", lambda largest: largest <= 64)
    assert [runtime.select("cpu", needs=KernelRequirements(n)).NAME for n in (127, 65)] == [
        "float"
    ] * 2
    assert runtime.select("cpu", needs=KernelRequirements(64)).NAME == "onednn"
    with pytest.raises(SettingError, match=r"VNNI.*weights reach 127.*reduce_range"):
        runtime.select("cpu", "onednn")


SATURATION = """
import torch
from dfq.device import int8_is_exact, resolve_precision, resolve_products
cpu = torch.device("cpu")
print(int8_is_exact(cpu), int8_is_exact(cpu, 64))
print(resolve_precision("auto", cpu), resolve_products("auto", cpu))
"""


@pytest.mark.skipif(not device.cpu_has("avx2"), reason="this is no x86 processor with AVX2")
def test_what_onednn_is_limited_to_decides_and_not_the_processor() -> None:
    """Limited to AVX2, oneDNN saturates on every processor, and takes no bfloat16."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ended = subprocess.run(
        [sys.executable, "-c", SATURATION],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["False", "True", "float32", "float32"]


@needs_onednn
@pytest.mark.parametrize("bits", [4, 8])
def test_a_reduced_range_runs_on_onednn_and_as_the_reference_does(bits: int) -> None:
    model = quantized(FAMILIES[0], bits=bits, attention="float")
    images = images_for(model)
    exact = model(images)
    model.set_backend(None)
    assert model.backend == "onednn"
    logits = model(images)
    g = torch.Generator().manual_seed(0)
    for layer in (m for m in model.modules() if isinstance(m, IntegerLinear)):
        x = torch.randint(0, 256, (9, layer.in_features), generator=g, dtype=torch.uint8)
        _, params, packed = layer.prepare()
        fast = onednn.linear(x, params, packed, OutputFormat())
        slow = reference.linear(x, params, reference.prepack(params), OutputFormat())
        assert spread(fast, slow) < 1e-5
    same = (logits - exact).abs().amax(1) < 1e-4
    assert float(same.float().mean()) >= 0.75, "an activation may round to the next level, rarely"
    assert spread(logits, exact) < 0.02, "saturation gives 0.14"
    model.set_backend("reference")


@every_backend
@given(seed=st.integers(0, 999), bits=st.integers(4, 8))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_outputs_of_fewer_bits_end_at_their_largest_integer(
    kernels: Any, seed: int, bits: int
) -> None:
    x, params = make(kernels, 7, 40, 33, seed, "random")
    out = OutputFormat(torch.uint8, 1e-3, 3, 2**bits - 1, "none")
    fast, exact = both(kernels, x, params, out)
    assert int(fast.max()) == int(exact.max()) == 2**bits - 1
    assert int((fast.int() - exact.int()).abs().max()) <= 1


def test_a_registered_backend_runs_where_it_is_asked_for_or_preferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Narrow:
        """The reference arithmetic, for weights of 4 bits alone."""

        NAME = "narrow"

        def __getattr__(self, name: str) -> object:
            return getattr(reference, name)

        def unsupported_reason(self, device: torch.device, needs: KernelRequirements) -> str | None:  # noqa: ARG002
            return None if needs.max_weight <= 8 else "it takes weights of 4 bits."

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_backends", [onednn, float_gemm, reference])
        runtime.register(Narrow())  # type: ignore[arg-type]
        assert runtime.backends() == ["onednn", "float", "reference", "narrow"]
        assert runtime.select("cpu", needs=KernelRequirements(8)).NAME != "narrow"
        assert runtime.select("cpu", "narrow", KernelRequirements(8)).NAME == "narrow"
        patch.setattr(registry, "_backends", [onednn, float_gemm, reference])
        runtime.register(Narrow(), preferred=True)  # type: ignore[arg-type]
        assert runtime.backends()[0] == "narrow"
        assert runtime.select("cpu", needs=KernelRequirements(8)).NAME == "narrow"
        assert runtime.select("cpu", needs=KernelRequirements(9)).NAME != "narrow"
        with pytest.raises(SettingError, match=r"narrow.*takes weights of 4 bits"):
            runtime.select("cpu", "narrow", KernelRequirements(9))
        with pytest.raises(SettingError, match="registered already"):
            runtime.register(Narrow())  # type: ignore[arg-type]
    assert "narrow" not in runtime.backends()
