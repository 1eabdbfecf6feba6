"""Quantized models through ``torch.compile``: the same numbers, and what cannot be compiled."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from conftest import make_vit
from exported_models import MEMBERS, quantized

import dfq
from dfq.errors import SettingError
from dfq.quantization.model import QuantizedViT
from dfq.runtime import opaque

needs_compiler = pytest.mark.skipif(opaque.compiler() is None, reason="there is no C++ compiler")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch.compiler.reset()


def made(attention: str = "float") -> QuantizedViT:
    model = quantized(MEMBERS[0].values[0], bits=8, attention=attention)
    return model.set_backend(None)


def images(model: QuantizedViT, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, *model.arch.image_size, generator=generator)


@needs_compiler
@pytest.mark.parametrize(("attention", "batches"), [("float", (2, 5, 0)), ("int8", (2,))])
def test_compiled_models_give_the_same_logits(attention: str, batches: tuple[int, ...]) -> None:
    model = made(attention)
    compiled = copy.deepcopy(model)
    compiled.compile()
    assert compiled.compiled
    assert not model.compiled
    for count in batches:
        x = images(model, count)
        actual, exact = compiled(x), model(x)
        assert actual.shape == exact.shape
        assert float((actual - exact).norm()) <= 0.03 * float(exact.norm())


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_compiler_may_be_the_first_to_meet_a_model(bits: int, tmp_path: Path) -> None:
    """Inputs of 48 are no multiple of a group of 32."""
    module = make_vit(embed_dim=48, num_heads=3)
    result = dfq.quantize(module, bits=bits, calibration="noise", images=4, out=tmp_path / "out")
    fresh, x = dfq.load(result.checkpoint), images(dfq.load(result.checkpoint, runtime="torch"), 2)
    expected = dfq.load(result.checkpoint)(x)
    actual = torch.compile(fresh, fullgraph=True)(x)
    assert float((actual - expected).norm()) <= 1e-3 * float(expected.norm())


@needs_compiler
@torch.no_grad()
def test_an_exporter_may_be_the_first_to_meet_a_model(tmp_path: Path) -> None:
    module = make_vit(embed_dim=48, num_heads=3)
    result = dfq.quantize(
        module, bits=4, attention="int8", calibration="noise", images=4, out=tmp_path / "out"
    )
    x = images(dfq.load(result.checkpoint, runtime="torch"), 2)
    expected = dfq.load(result.checkpoint).set_backend("reference")(x)
    program = torch.export.export(dfq.load(result.checkpoint), (x,)).module()
    for actual in (program(x), torch.compile(program)(x)):
        assert float((actual - expected).norm()) <= 0.01 * float(expected.norm())


@needs_compiler
def test_checkpoints_are_loaded_compiled(tmp_path: Path) -> None:
    result = dfq.quantize("demo", bits=8, calibration="noise", images=4, out=tmp_path / "out")
    assert dfq.load(result.checkpoint, compiled=True).compiled
    assert not dfq.load(result.checkpoint).compiled


def test_copies_are_parts_of_their_own() -> None:
    model = made()
    numbers = {m.number for m in model.modules() if isinstance(m, opaque.OpaqueModule)}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not numbers & {
            m.number for m in other.modules() if isinstance(m, opaque.OpaqueModule)
        }


def test_without_a_compiler_compiling_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque.shutil, "which", lambda _: None)
    with pytest.raises(SettingError, match=r"takes a C\+\+ compiler \(g\+\+, clang\+\+, cl\)"):
        made().compile()
    assert dfq.doctor().compiler is None
