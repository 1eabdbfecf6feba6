"""``dfq.export``: what it writes, what it refuses, and what stays as it was."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import checkpoint_of, onnx_session, spread
from torch import Tensor
from trees import tree
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.errors import CheckpointError, ExtraError, OutputError, SettingError
from dfq.exporting.formats import SUFFIXES
from dfq.exporting.forms import integer_layers
from dfq.exporting.program import reference_form
from dfq.installation import install_command
from dfq.ownership import replace_files
from dfq.results.values import to_json

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)
FORMATS = [
    pytest.param("onnx"),
    pytest.param("torch"),
    pytest.param("openvino", marks=needs_openvino),
]
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("export") / "w8a8", depth=1)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("export") / "w4a8", bits=4, depth=1)


def run_onnx(path: Path, images: Tensor) -> tuple[Tensor, str]:
    session = onnx_session(path)
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits), session.get_modelmeta().custom_metadata_map["weights"]


def run_openvino(path: Path, images: Tensor) -> tuple[Tensor, str]:
    core = importlib.import_module("openvino").Core()
    model = core.read_model(path)
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    return torch.from_numpy(compiled(images.numpy())[0]), model.get_rt_info(
        ["dfq", "weights"]
    ).astype(str)


def run_torch(path: Path, images: Tensor) -> tuple[Tensor, str]:
    extra = {"dfq.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    return program(images), json.loads(extra["dfq.json"])["weights"]


READERS = {"onnx": run_onnx, "openvino": run_openvino, "torch": run_torch}
"""Readers of files by format: logits of images, and the file's ``weights``."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- what is written


@torch.no_grad()
def test_the_file_takes_what_the_checkpoint_takes(checkpoint: Path, tmp_path: Path) -> None:
    dfq.export(checkpoint, out=tmp_path / "model.onnx")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    session = onnx_session(tmp_path / "model.onnx")
    (actual,) = session.run(None, {"images": images.numpy()})
    expected = dfq.load(checkpoint)(images)
    error = (torch.from_numpy(actual) - expected).norm() / (expected - expected.mean(0)).norm()
    assert float(error) < 0.1


@every_format
def test_the_result_says_what_was_written(format: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / f"model{SUFFIXES[format]}"
    result = dfq.export(checkpoint, format=format, out=out)
    assert (result.checkpoint, result.path) == (str(checkpoint), str(out))
    assert (result.format, result.scheme, result.attention) == (format, "w8a8", "float")
    assert result.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert result.weights == "int8"


@every_format
def test_without_out_the_file_is_named_after_the_checkpoint(
    format: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dfq.export(checkpoint, format=format)
    assert result.path == f"w8a8{SUFFIXES[format]}"
    assert (tmp_path / result.path).is_file()


def test_the_file_says_what_it_is(four_bits: Path, tmp_path: Path) -> None:
    dfq.export(four_bits, out=tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    metadata = {p.key: p.value for p in model.metadata_props}
    assert (model.producer_name, model.producer_version) == ("dfq", dfq.__version__)
    assert metadata["scheme"] == "w4a8"
    assert metadata["weights"] == "int4, widened to int8"
    assert json.loads(metadata["mean"]) == pytest.approx([0.5, 0.4, 0.3])
    assert json.loads(metadata["image_size"]) == [16, 16]
    assert (metadata["classes"], metadata["dfq_version"]) == ("5", dfq.__version__)


def test_four_bits_can_stay_four_bits(four_bits: Path, tmp_path: Path) -> None:
    wide = dfq.export(four_bits, out=tmp_path / "wide.onnx")
    narrow = dfq.export(four_bits, out=tmp_path / "narrow.onnx", weights="int4")
    assert (wide.weights, narrow.weights) == ("int8", "int4")
    assert narrow.bytes < wide.bytes


@every_format
def test_an_older_export_is_replaced(
    format: str, checkpoint: Path, four_bits: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"model{SUFFIXES[format]}"
    dfq.export(checkpoint, format=format, out=out)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    dfq.export(four_bits, format=format, out=out)
    second = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(first) == set(second)
    assert first != second


MIXED: dict[str, dict[str, Any]] = {
    "8 bits, some 4": {"bits": 8, "layers": {"blocks.*.mlp.*": {"bits": 4}}},
    "4 bits, some 8": {"bits": 4, "layers": {"blocks.0.*": {"bits": 8}, "head": {"bits": 4}}},
}


@pytest.fixture(scope="module", params=MIXED)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers have 8 or 4 bits."""
    return checkpoint_of(tmp_path_factory.mktemp("export") / "mixed", **MIXED[request.param])


@pytest.mark.parametrize(
    ("format", "weights", "said"),
    [
        pytest.param("onnx", None, "int4, widened to int8"),
        pytest.param("onnx", "int4", "int4"),
        pytest.param("openvino", None, "int4, widened to int8", marks=needs_openvino),
        pytest.param("torch", None, "int4"),
    ],
)
@torch.no_grad()
def test_exceptions_by_layer_are_exported(
    format: str, weights: str | None, said: str, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"model{SUFFIXES[format]}"
    result = dfq.export(mixed, format=format, out=out, weights=weights)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    actual, kept = READERS[format](out, images)
    assert spread(actual, reference_form(dfq.load(mixed, runtime="torch"))(images)) < 0.01
    assert (result.weights, kept) == (said.rpartition(" ")[2], said)


def test_four_bit_layers_alone_are_int4(mixed: Path, tmp_path: Path) -> None:
    dfq.export(mixed, out=tmp_path / "model.onnx", weights="int4")
    constants = onnx.load(tmp_path / "model.onnx").graph.initializer
    kinds = {c.name: onnx.TensorProto.DataType.Name(c.data_type) for c in constants}
    layers = integer_layers(dfq.load(mixed, runtime="torch"))
    expected = {n: f"INT{layer.bits}" for n, layer in layers.items()}
    assert {name: kinds[f"{name}/weight"] for name in expected} == expected
    assert set(expected.values()) == {"INT4", "INT8"}


def test_other_bits_are_said_to_be_widened(tmp_path: Path) -> None:
    three_bits = checkpoint_of(tmp_path / "w3a8", bits=3)
    wide = dfq.export(three_bits, out=tmp_path / "model.onnx")
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert (wide.weights, metadata["weights"]) == ("int8", "int3, widened to int8")
    assert dfq.export(three_bits, format="torch", out=tmp_path / "model.pt2").weights == "int3"


@pytest.mark.parametrize(("reduce_range", "largest"), [(True, []), (False, ["127"])])
def test_weights_that_saturate_are_warned_of(
    reduce_range: bool, largest: list[str], tmp_path: Path
) -> None:
    path = checkpoint_of(tmp_path / "w8a8", attention="int8", reduce_range=reduce_range)
    warnings = dfq.export(path, out=tmp_path / "model.onnx").warnings
    assert [w.split()[2].strip(",") for w in warnings] == largest
    assert dfq.export(path, format="torch", out=tmp_path / "model.pt2").warnings == []


# ---- what is refused


@every_format
@pytest.mark.parametrize("content", [b"", b"precious", b"<net>", b"PK\x03\x04"], ids=repr)
def test_something_else_is_not_replaced(
    format: str, content: bytes, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"model{SUFFIXES[format]}"
    out.write_bytes(content)
    with pytest.raises(OutputError, match=r"something other than .*Nothing there was touched"):
        dfq.export(checkpoint, format=format, out=out)
    assert (out.read_bytes(), names(tmp_path)) == (content, [out.name])


def test_another_programs_model_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    dfq.export(checkpoint, out=tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    model.producer_name = "another"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(OutputError, match="something other than"):
        dfq.export(checkpoint, out=tmp_path / "model.onnx")


@needs_openvino
def test_weights_of_something_else_are_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"precious")
    with pytest.raises(OutputError, match="something other than"):
        dfq.export(checkpoint, format="openvino", out=tmp_path / "model.xml")
    assert (tmp_path / "model.bin").read_bytes() == b"precious"


@needs_openvino
@pytest.mark.parametrize("content", [b"precious", b""])
def test_weights_beside_an_export_are_replaced_if_dfq_wrote_them(
    checkpoint: Path, tmp_path: Path, content: bytes
) -> None:
    out = tmp_path / "model.xml"
    dfq.export(checkpoint, format="openvino", out=out)
    dfq.export(checkpoint, format="openvino", out=out)
    (tmp_path / "model.bin").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"model\.bin' is something other than"):
        dfq.export(checkpoint, format="openvino", out=out)
    assert tree(tmp_path) == before


@every_format
def test_links_are_followed_and_broken_ones_refused(
    format: str, checkpoint: Path, tmp_path: Path
) -> None:
    target, link = (tmp_path / f"{name}{SUFFIXES[format]}" for name in ("target", "link"))
    link.symlink_to(target)
    with pytest.raises(OutputError, match="is a link to"):
        dfq.export(checkpoint, format=format, out=link)
    dfq.export(checkpoint, format=format, out=target)
    before = target.stat().st_ino
    if format == "openvino":
        link.with_suffix(".bin").symlink_to(target.with_suffix(".bin"))
    dfq.export(checkpoint, format=format, out=link)
    assert link.is_symlink()
    assert target.stat().st_ino != before


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "format": ({"format": "tflite"}, SettingError, "one of onnx, openvino, torch"),
    "suffix": ({"out": "model.xml"}, OutputError, r"ends in \.onnx"),
    "weights": ({"weights": "int2"}, SettingError, "one of int8, int4"),
    "weights of 8 bits": (
        {"weights": "int4"},
        SettingError,
        "needs layers of 4 bits; this checkpoint has 8",
    ),
    "weights of a program": (
        {"weights": "int8", "format": "torch"},
        SettingError,
        "choice of format='onnx' alone",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_explained(
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        dfq.export(checkpoint, **changes)
    assert not names(tmp_path)


def test_blocks_too_small_for_int4_are_refused(tmp_path: Path) -> None:
    small = checkpoint_of(tmp_path / "w4a8", bits=4, group=8)
    with pytest.raises(SettingError, match=r"blocks of 16 or more with one scale.*has none"):
        dfq.export(small, out=tmp_path / "model.onnx", weights="int4")
    assert names(tmp_path) == ["cache", "w4a8"]


def test_a_directory_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        dfq.export(checkpoint, out=tmp_path / "model.onnx")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a dfq checkpoint"):
        dfq.export(tmp_path, out=tmp_path / "model.onnx")


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnx"), ("openvino", "openvino")])
def test_an_absent_package_is_named_with_its_extra(
    format: str, package: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str, *args: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imported(name, *args)

    imported: Callable[..., Any] = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ExtraError, match=re.escape(install_command(format))):
        dfq.export(checkpoint, format=format, out=tmp_path / f"model{SUFFIXES[format]}")
    assert not names(tmp_path)


@every_format
def test_an_export_that_fails_leaves_nothing(
    format: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        dfq.export(checkpoint, format=format, out=tmp_path / f"model{SUFFIXES[format]}")
    assert not names(tmp_path)


# ---- two files at once


def test_files_move_together(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    moves = {tmp_path / "new" / n: tmp_path / n for n in ("a", "b")}
    for new, place in moves.items():
        new.write_text("new")
        place.write_text("old")
    replace_files(moves)
    assert [p.read_text() for p in moves.values()] == ["new", "new"]


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "first"])
def test_files_that_cannot_all_move_stay(there: bool, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    moves = {tmp_path / "new" / n: tmp_path / n for n in ("a", "b")}
    (tmp_path / "new" / "a").write_text("new")
    for place in moves.values() if there else ():
        place.write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_files(moves)
    assert [p.is_file() for p in moves.values()] == [there, there]
    assert all(p.read_text() == "old" for p in moves.values() if there)


# ---- the command


def test_json_of_export_is_the_result_and_nothing_else(four_bits: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    arguments = ["export", str(four_bits), "--out", str(out), "--weights", "int4", "--json"]
    ended = CliRunner().invoke(app, arguments)
    expected = dfq.export(four_bits, out=out, weights="int4")
    assert (ended.exit_code, json.loads(ended.stdout)) == (0, to_json(expected))


@needs_openvino
def test_the_table_counts_products_on_integers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["export", str(checkpoint), "--format", "openvino"])
    lines = [line for line in ended.stdout.splitlines() if "products" in line]
    assert len(lines) == 2
    assert all(" 6 " in line for line in lines)
