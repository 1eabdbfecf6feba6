"""The integer kernels against the reference that defines them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfq import runtime
from dfq.errors import SettingError
from dfq.runtime import onednn, reference
from dfq.runtime.params import LinearParams, OutputFormat

needs_vnni = pytest.mark.skipif(
    not onednn.available(torch.device("cpu")), reason="this processor has no VNNI"
)


def make(rows: int, inputs: int, outputs: int, seed: int, kind: str) -> tuple[Tensor, LinearParams]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (rows, inputs), generator=g, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    scale, bias = torch.rand(outputs, generator=g) * 0.01 + 1e-5, torch.randn(outputs, generator=g)
    if kind == "extreme":
        x, weight = torch.full_like(x, 255), torch.full_like(weight, 127)
        weight[::2] = -127
    elif kind == "huge":
        scale = scale * 1e6
    elif kind == "tiny":
        scale, bias = scale * 1e-12, bias * 1e-9
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    zero_point = 0 if kind == "zero" else 117
    return x, LinearParams(weight, scale, bias, 0.037, zero_point)


def both(x: Tensor, params: LinearParams, out: OutputFormat) -> tuple[Tensor, Tensor]:
    fast = onednn.linear(x, params, onednn.prepack(params), out)
    return fast, reference.linear(x, params, reference.prepack(params), out)


@needs_vnni
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["random", "extreme", "huge", "tiny", "zero"]),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_float_outputs_agree_within_four_units_in_the_last_place(
    rows: int, inputs: int, outputs: int, seed: int, kind: str
) -> None:
    x, params = make(rows, inputs, outputs, seed, kind)
    fast, exact = both(x, params, OutputFormat())
    product = (exact - params.bias).abs()
    bound = 4 * torch.finfo(torch.float32).eps * (product + params.bias.abs())
    assert bool(((fast - exact).abs() <= bound).all())


@needs_vnni
@given(
    seed=st.integers(0, 999),
    inputs=st.integers(1, 200),
    gelu=st.sampled_from([None, "none", "tanh"]),
    zero_point=st.integers(0, 255),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_uint8_outputs_agree_within_one_level(
    seed: int, inputs: int, gelu: str | None, zero_point: int
) -> None:
    x, params = make(7, inputs, 33, seed, "random")
    out = OutputFormat(torch.uint8, 0.11, zero_point, gelu)  # type: ignore[arg-type]
    fast, exact = both(x, params, out)
    assert fast.dtype == exact.dtype == torch.uint8
    assert int((fast.int() - exact.int()).abs().max()) <= 1


@needs_vnni
def test_bfloat16_outputs_agree_within_one_rounding() -> None:
    x, params = make(5, 64, 48, 0, "random")
    fast, exact = both(x, params, OutputFormat(torch.bfloat16))
    torch.testing.assert_close(fast, exact, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backend", sorted(runtime.BACKENDS))
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8), (1, 8), (2, 3, 8)])
def test_shapes_hold_also_for_empty_batches(backend: str, shape: tuple[int, ...]) -> None:
    if backend == "onednn" and not onednn.available(torch.device("cpu")):
        pytest.skip("this processor has no VNNI")
    _, params = make(1, 8, 5, 0, "random")
    kernels = runtime.BACKENDS[backend]
    x = torch.zeros(shape, dtype=torch.uint8)
    y = kernels.linear(x, params, kernels.prepack(params), OutputFormat())
    assert y.shape == (*shape[:-1], 5)


def test_reference_sums_are_exact_integers() -> None:
    x, params = make(3, 4096, 6, 0, "extreme")
    sums = (x.long() - params.input_zero_point) @ params.weight.long().T
    expected = sums.float() * (params.weight_scale * params.input_scale) + params.bias
    found = reference.linear(x, params, reference.prepack(params), OutputFormat())
    assert torch.equal(found, expected)


def test_quantize_rounds_half_to_even_and_clips() -> None:
    x = torch.tensor([-1e9, -0.5, 0.5, 1.5, 2.5, 1e9])
    assert reference.quantize(x, 1.0, 10).tolist() == [0, 10, 10, 12, 12, 255]


def test_integer_attention_is_exact_attention_on_rounded_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, generator=g) for _ in range(3))
    scales = (0.02, 0.03, 0.025, 1 / 255)
    found = reference.attention(q, k, v, scales)
    qi, ki, vi = (
        (t / s).round().clamp(-127, 127).double()
        for t, s in zip((q, k, v), scales[:3], strict=True)
    )
    scores = (qi @ ki.transpose(-2, -1)) * (0.02 * 0.03 * 0.25)
    p = (scores.softmax(-1) * 255).round()
    torch.testing.assert_close(found, ((p @ vi) * (0.025 / 255)).float(), rtol=0, atol=2e-4)


def test_unknown_backends_are_named() -> None:
    with pytest.raises(SettingError, match=r"'fast'.*onednn.*reference"):
        runtime.select("cpu", "fast")


def test_without_vnni_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert runtime.select("cpu").NAME == "reference"
    with pytest.raises(SettingError, match="VNNI"):
        runtime.select("cpu", "onednn")
