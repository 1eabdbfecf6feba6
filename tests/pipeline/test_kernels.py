"""Which kernels run the layers of a checkpoint here, and why faster ones do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import checkpoint_of, quantized_as
from families import FAMILIES

import dfq
from dfq import device
from dfq.pipeline.kernels import KernelChoice, kernels_of_kinds, kernels_of_model
from dfq.quantization.layers import IntegerLinear
from dfq.recipe import LayerSettings, QuantizationSettings
from dfq.results.tables import facts_table, field_table
from dfq.slow import TOO_WIDE

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def limit(patch: pytest.MonkeyPatch, largest: int, bfloat16: bool = False) -> None:
    """Make 8-bit products exact up to ``largest``, and bfloat16 native or not."""
    patch.setattr(device, "_worst_product_is_exact", lambda wanted: wanted <= largest)
    patch.setattr(device, "multiplies_bfloat16", lambda _: bfloat16)


def by_layers(found: list[KernelChoice]) -> dict[str, KernelChoice]:
    return {each.layers: each for each in found}


@pytest.mark.parametrize(
    ("largest", "reduced", "full"),
    [(127, "onednn", "onednn"), (64, "onednn", "float"), (0, "float", "float")],
)
def test_kinds_of_layers_run_on_the_first_exact_backend(
    largest: int, reduced: str, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, largest)
    for kind, each in by_layers(kernels_of_kinds([CPU])).items():
        if each.bits is None:
            continue
        expected = full if "full range" in kind else reduced
        assert (each.backend, each.max_weight) == (expected, 127 if "full range" in kind else 64)
        assert each.operands == ("int8" if expected == "onednn" else "float32")
        assert set(each.refused) == (set() if expected == "onednn" else {"onednn", "int_mm"})


def test_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 64)
    reason = by_layers(kernels_of_kinds([CPU]))["8-bit weights, full range"].refused["onednn"]
    assert "saturate" in reason
    assert "weights reach 127" in reason
    assert "reduce_range = true" in reason


@pytest.mark.parametrize("bfloat16", [False, True])
def test_attention_is_said_with_its_operands(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 127, bfloat16)
    kinds = by_layers(kernels_of_kinds([CPU]))
    dtype = "bfloat16" if bfloat16 else "float32"
    assert (kinds["attention, float"].backend, kinds["attention, float"].operands) == (
        "torch",
        dtype,
    )
    assert (kinds["attention, int8"].backend, kinds["attention, int8"].operands) == (
        "onednn",
        dtype,
    )


def test_a_gpu_multiplies_in_floating_point(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 127, bfloat16=True)
    monkeypatch.setattr("dfq.runtime.float_gemm.linear_dtype", lambda _: torch.bfloat16)
    for each in kernels_of_kinds([GPU]):
        if each.bits is not None:
            assert (each.device, each.backend, each.operands) == ("cuda", "float", "bfloat16")
            assert "not on 'cuda'" in each.refused["onednn"]


def test_layers_of_a_model_are_grouped_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 127)
    model = quantized_as(FAMILIES[0], QuantizationSettings(bits=4))
    found, depth = kernels_of_model(model, [CPU]), model.arch.depth
    assert [(each.layers, each.count, each.bits) for each in found] == [
        ("patch_embed", 1, 8),
        ("blocks.*.attn.qkv", depth, 4),
        ("blocks.*.attn.proj", depth, 4),
        ("blocks.*.mlp.fc1", depth, 4),
        ("blocks.*.mlp.fc2", depth, 4),
        ("head", 1, 8),
        ("blocks.*.attn.product", depth, None),
    ]
    linears = model.linear_layers()
    for each in found[:-1]:
        name = each.layers.replace("blocks.*", "blocks.0")
        assert isinstance(linears[name], IntegerLinear)
        assert each.backend == linears[name].select(None).NAME


def test_layers_of_another_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 6-bit layer of the full range stays within what AVX2 multiplies, one of 8 bits does not."""
    limit(monkeypatch, 64)
    layers = {"blocks.1.mlp.fc1": LayerSettings(bits=6)}
    settings = QuantizationSettings(bits=8, reduce_range=False, layers=layers, group=0)
    found = by_layers(kernels_of_model(quantized_as(FAMILIES[0], settings), [CPU]))
    assert (found["blocks.1.mlp.fc1"].backend, found["blocks.1.mlp.fc1"].bits) == ("onednn", 6)
    assert (found["blocks.0.mlp.fc1"].backend, found["blocks.0.mlp.fc1"].count) == ("float", 1)
    assert found["blocks.*.mlp.fc2"].backend == "float"
    assert "saturate" in found["blocks.*.mlp.fc2"].refused["onednn"]


@pytest.fixture(scope="module")
def full_range(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "q"
    return checkpoint_of(path, bits=8, reduce_range=False)


def test_inspect_says_it_of_a_checkpoint(full_range: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 64)
    facts = dfq.inspect(full_range)
    assert facts["backend"] == "float"
    rows = {row["layers"]: row for row in facts["kernels"] if row["device"] == "cpu"}
    assert rows["head"]["refused"].keys() == {"onednn", "int_mm"}
    assert json.loads(json.dumps(facts["kernels"])) == facts["kernels"]
    shown = text(facts_table(facts))
    assert "blocks.*.attn.qkv (2), int8 weights up to 127: float in float32, not onednn" in shown
    assert shown.count("sums saturate") == 1


def test_the_doctor_says_it_of_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    limit(monkeypatch, 64)
    report = dfq.doctor()
    assert {each.layers for each in report.kernels} >= {
        "8-bit weights, full range",
        "attention, int8",
    }
    shown = text(field_table(dataclasses.asdict(report)))
    assert "8-bit weights, full range: float in float32, not onednn" in shown


def text(table: Any) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_loading_says_once_that_weights_are_too_wide(
    full_range: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, 64)
    with pytest.warns(UserWarning, match="saturate") as said:
        model = dfq.load(full_range)
    assert [str(each.message) for each in said] == [TOO_WIDE]
    assert said[0].filename == __file__, "the line of the caller"
    assert model.backend == "float"
    dfq.load(checkpoint_of(tmp_path / "q", bits=8))  # a warning would be an error


def test_where_they_are_multiplied_as_integers_loading_says_nothing(
    full_range: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for largest in (127, 0):
        limit(monkeypatch, largest)
        dfq.load(full_range)
