"""The other commands: what they print, and their JSON."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from command_line import MODEL, Cli, assert_schema
from PIL import Image

import dfq
from dfq.data.dataset import SparseImageDataset
from dfq.data.preview import HEADING
from dfq.results.values import EvaluateResult, InvertResult


def test_json_of_invert_is_the_result_and_nothing_else(cli: Cli) -> None:
    ended = cli.invert("--json")
    assert ended.code == 0
    assert_schema(ended.json, InvertResult)


@pytest.mark.parametrize("method", ["pri", "smi", "dmi", "noise"])
def test_every_method_inverts(method: str, cli: Cli, tmp_path: Path) -> None:
    assert cli.invert("--method", method, "--out", tmp_path / "images").code == 0
    assert len(SparseImageDataset(tmp_path / "images")) == 4


def test_the_second_inversion_into_a_directory_finds_the_first(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    assert cli.invert("--out", tmp_path / "images", "--json").json["cached"]


def test_json_of_evaluate_is_the_result_and_nothing_else(
    cli: Cli, cli_checkpoint: Path, labeled_npz: Path
) -> None:
    ended = cli("evaluate", cli_checkpoint, "--data", labeled_npz, "--json")
    assert ended.code == 0
    assert_schema(ended.json, EvaluateResult)
    assert ended.json["agreement"] is None


def test_evaluation_beside_the_float_model_has_agreement(
    cli: Cli, cli_checkpoint: Path, labeled_npz: Path
) -> None:
    args = ["--float", MODEL, "--weights", str(cli.weights), "--data", str(labeled_npz)]
    printed = cli("evaluate", cli_checkpoint, *args, "--json").json
    assert_schema(printed, EvaluateResult)
    assert 0 <= printed["agreement"] <= 1


def test_a_gate_of_evaluate_exits_with_1_and_prints_the_result(
    cli: Cli, cli_checkpoint: Path, labeled_npz: Path
) -> None:
    ended = cli(
        "evaluate", cli_checkpoint, "--data", labeled_npz, "--min-accuracy", "0.8", "--json"
    )
    assert ended.code == 1
    assert_schema(ended.json, EvaluateResult)


def test_inspect_says_what_a_checkpoint_is(cli: Cli, cli_checkpoint: Path) -> None:
    printed = cli("inspect", cli_checkpoint, "--json").json
    assert (printed["kind"], printed["model"], printed["scheme"]) == ("checkpoint", MODEL, "w8a8")


def test_inspect_draws_a_dataset(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    ended = cli("inspect", tmp_path / "images", "--preview", tmp_path / "sheet.png")
    assert ended.code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 128 + 6, 2 * 128 + 6 + HEADING)


def test_inspect_shows_a_table(cli: Cli, cli_checkpoint: Path) -> None:
    ended = cli("inspect", cli_checkpoint)
    assert ended.code == 0
    assert "checkpoint" in ended.stdout


def test_inspect_shows_the_noise_of_every_layer(cli: Cli, cli_checkpoint: Path) -> None:
    shown = cli("inspect", cli_checkpoint, "--layers").stdout
    assert "patch_embed" in shown
    assert "blocks.0.attn.qkv" in shown
    layers = cli("inspect", cli_checkpoint, "--layers", "--json").json["layers"]
    assert layers[-1]["name"] == "head"
    assert all(row["both"] > 10 for row in layers)


@pytest.mark.parametrize(
    "report",
    ["[]", "{", '{"layers": 3}', '{"layers": [{"name": 1}]}', '{"layers": [["a"]]}', "null"],
)
def test_a_report_without_layers_is_refused(
    cli: Cli, cli_checkpoint: Path, tmp_path: Path, report: str
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(cli_checkpoint, copied)
    (copied / "report.json").write_text(report)
    ended = cli("inspect", copied, "--layers")
    assert ended.code == 2
    assert "no measured layers" in ended.stderr


def test_inspect_does_not_draw_checkpoints(cli: Cli, cli_checkpoint: Path, tmp_path: Path) -> None:
    ended = cli("inspect", cli_checkpoint, "--preview", tmp_path / "sheet.png")
    assert ended.code == 2
    assert "not a sparse-image dataset" in ended.stderr


def test_models_are_listed(cli: Cli) -> None:
    shown = cli("models").stdout
    assert all(f"{name}  " in shown for name in ("demo", "vit_base", "deit_tiny_patch16_224"))


def test_models_are_filtered(cli: Cli) -> None:
    entries = cli("models", "deit_tiny", "--json").json
    assert entries
    assert all("deit_tiny" in entry["name"] for entry in entries)


def test_the_doctor_says_what_this_machine_offers(cli: Cli) -> None:
    printed = cli("doctor", "--json").json
    assert_schema(
        {k: v for k, v in printed.items() if k in ("processor", "threads", "backend")},
        dataclasses.make_dataclass(
            "Part", [("processor", str), ("threads", int), ("backend", str)]
        ),
    )
    assert printed["versions"]["dfq"] == dfq.__version__


def test_the_doctor_fails_where_something_is_wrong(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = cli("doctor", "--json", "--cache", tmp_path / "file")
    assert result.code == 1
    assert any("cannot be written" in p for p in result.json["problems"])


def test_an_empty_cache_is_said_to_be_empty(cli: Cli) -> None:
    assert cli("cache", "list").stdout == "The cache is empty.\n"


def test_the_cache_lists_its_datasets(cli: Cli) -> None:
    path = cli.invert("--json").json["path"]
    (entry,) = cli("cache", "list", "--json").json
    assert (entry["path"], entry["method"], entry["images"]) == (path, "pri", 4)
    assert entry["problem"] is None


def test_a_whole_cache_verifies(cli: Cli) -> None:
    cli.invert()
    assert cli("cache", "verify").code == 0


def test_a_damaged_cache_exits_with_1(cli: Cli) -> None:
    path = Path(cli.invert("--json").json["path"])
    shard = next(path.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    ended = cli("cache", "verify", "--json")
    assert ended.code == 1
    assert "is damaged" in ended.json[0]["problem"]


@pytest.mark.parametrize("name", ["all", MODEL], ids=["all", "start of the name"])
def test_cached_datasets_are_removed(name: str, cli: Cli) -> None:
    path = Path(cli.invert("--json").json["path"])
    assert cli("cache", "remove", name).code == 0
    assert not path.exists()
