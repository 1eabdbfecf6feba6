"""Checkpoints of formats 5 to 8 beside the reader written from docs/checkpoint-format.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from documented_reader import DocumentedReader
from safetensors.torch import save_file

import dfq
from dfq.errors import CheckpointError

ROOT = Path(__file__).parents[1]

FC2 = {"blocks.*.mlp.fc2": {"bits": 8, "input_bits": 6}}
MIXED = {"*": {"bits": 6}, "blocks.1.*": {"bits": 3, "group": 8}, "*.proj": {"input_bits": 5}}

SCHEMES: dict[str, dict[str, Any]] = {
    "w3a8": {"bits": 3},
    "w6a6": {"bits": 6, "input_bits": 6},
    "w7a8": {"bits": 7},
    "w2a4": {"bits": 2, "input_bits": 4},
    "w5a7, full range": {"bits": 5, "input_bits": 7, "reduce_range": False},
    "w7a8, full range": {"bits": 7, "reduce_range": False},
    "w6a8, no groups": {"bits": 6, "group": 0},
    "w4a8, fc2 8 bits": {"bits": 4, "layers": FC2},
    "mixed": {"bits": 4, "layers": MIXED},
    "w3a5, attention int8": {"bits": 3, "input_bits": 5, "attention": "int8"},
    "w8a8, symmetric": {"activations": "symmetric"},
    "w4a5, symmetric, attention int8": {
        "bits": 4,
        "input_bits": 5,
        "attention": "int8",
        "activations": "symmetric",
    },
}


def made(path: Path, **quantization: Any) -> Path:
    """A checkpoint of a small model whose layers have odd numbers of inputs."""
    dfq.quantize(
        make_vit(embed_dim=33, num_heads=3),
        settings={"quantization": {"group": 16, "fractal": 2, **quantization}},
        images=4,
        iterations=2,
        stages=1,
        threads=1,
        cache=path / "cache",
        out=path / "c",
    )
    return path / "c"


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)


def logits(path: Path) -> np.ndarray:
    """Return the logits of the reference kernels."""
    model = dfq.load(path).set_backend("reference")
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std)
    )
    return model((torch.from_numpy(pixels()) / 255 - mean) / std).numpy()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_documented_reader_reads_every_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: dict[str, Any]
) -> None:
    """A sum in another order may move an activation by a level, which is wide with few bits."""
    monkeypatch.setattr("dfq.quantization.model.attention_dtype", lambda _: torch.float32)
    expected = logits(made(tmp_path, **scheme))
    assert np.abs(expected - expected.mean(0)).max() > 0.1 * np.abs(expected).max()
    actual = DocumentedReader(tmp_path / "c")(pixels())
    level = 2 ** (8 - scheme.get("input_bits", 8))
    assert np.abs(actual - expected).max() < 0.02 * level * np.abs(expected).max()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_integers_of_every_scheme_are_in_the_specified_range(
    tmp_path: Path, scheme: dict[str, Any]
) -> None:
    reader = DocumentedReader(made(tmp_path, **scheme))
    names = [n.removesuffix(".input_scale") for n in reader.tensors if n.endswith(".input_scale")]
    limit = 2 ** (reader.product_bits - 1)
    for name in names:
        bits, input_bits, group = reader.scheme(name)
        inputs = {"patch_embed": 48, "head": 33}.get(name, 132 if name.endswith("fc2") else 33)
        weight = reader.weight(name, inputs)
        assert -limit <= weight.min() < 0 < weight.max() < limit
        zero_point = reader.tensors[f"{name}.input_zero_point"]
        assert zero_point == 0 if reader.lowest_input(name) else 0 <= zero_point < 2**input_bits
        scales = reader.tensors.get(f"{name}.group_scale")
        assert (scales is not None) == (group > 0)
        if scales is not None:
            assert scales.shape == (len(weight), -(-inputs // group))
            assert scales.min() >= 1
            assert scales.max() <= 2 ** (reader.product_bits - bits)


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("attention", ["float", "int8"])
def test_older_versions_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, bits: int, attention: str
) -> None:
    monkeypatch.setattr("dfq.quantization.model.attention_dtype", lambda _: torch.float32)
    made(tmp_path, bits=bits, attention=attention, reduce_range=version == 6)
    expected = logits(tmp_path / "c")

    def older(config: dict[str, Any]) -> None:
        config["format_version"] = version
        settings = config["recipe"]["quantization"]
        assert "layers" not in settings
        del settings["input_bits"]
        if version == 5:
            del settings["reduce_range"]

    change_config(tmp_path / "c", older)
    assert np.array_equal(logits(tmp_path / "c"), expected)
    actual = DocumentedReader(tmp_path / "c")(pixels())
    assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("activations", "version"), [("asymmetric", 7), ("symmetric", 8)], ids=["7", "8"]
)
def test_files_say_the_oldest_version_that_knows_them(
    tmp_path: Path, activations: str, version: int
) -> None:
    """A checkpoint with asymmetric activations has the bytes that it had in version 7."""
    path = made(tmp_path, activations=activations)
    config = json.loads((path / "config.json").read_text())
    assert config["format_version"] == version
    written = config["recipe"]["quantization"].get("activations")
    assert written == {7: None, 8: "symmetric"}[version]
    assert ("activations" in (path / "recipe.toml").read_text()) == (version == 8)


@pytest.mark.parametrize(
    ("bits", "input_bits", "activations", "largest"),
    [(6, 6, "asymmetric", 63), (3, 4, "asymmetric", 15), (8, 8, "symmetric", 0)],
)
def test_a_zero_point_beyond_the_inputs_bits_is_refused(
    tmp_path: Path, bits: int, input_bits: int, activations: str, largest: int
) -> None:
    path = made(tmp_path, bits=bits, input_bits=input_bits, activations=activations)
    state = dfq.load(path).state_dict()
    state["blocks.0.mlp.fc1.input_zero_point"].fill_(largest + 1)
    save_file(state, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"fc1.*{largest + 1}.*0\.\.{largest}"):
        dfq.load(path)


def packed_examples() -> list[tuple[int, list[int], bytes]]:
    """Bits, weights and bytes in the page's table of packing."""
    page = (ROOT / "docs" / "checkpoint-format.md").read_text()
    rows = re.findall(r"^\| (\d) \| `([-\d, ]+)` \| `([0-9A-F ]+)` \|$", page, re.M)
    return [(int(b), [int(w) for w in ws.split(",")], bytes.fromhex(x)) for b, ws, x in rows]


def test_the_pages_examples_of_packing_are_right() -> None:
    examples = packed_examples()
    assert {bits for bits, _, _ in examples} >= {2, 3, 4, 6}
    for bits, weights, stored in examples:
        row = np.frombuffer(stored, np.uint8)[None]
        assert DocumentedReader.unpack(row, bits, len(weights))[0].tolist() == weights
        assert len(stored) == -(-len(weights) * bits // 8)
