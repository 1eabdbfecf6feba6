"""The command ``quantize``: output, cache, recipes and gates."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import FAST, MODEL, Cli, assert_schema
from safetensors.torch import load_file, save_file

import dfq
from dfq.results.values import QuantizeResult


def test_json_of_quantize_is_the_result_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--json")
    assert ended.code == 0
    assert_schema(ended.json, QuantizeResult)


def test_json_of_quantize_with_data_has_accuracies(
    cli: Cli, tmp_path: Path, labeled_npz: Path
) -> None:
    printed = cli.quantize(tmp_path / "out", "--eval", labeled_npz, "--json").json
    assert_schema(printed, QuantizeResult)
    assert printed["accuracy"]["images"] == 20
    assert printed["accuracy"]["correct"] == round(20 * printed["accuracy"]["quantized"])
    assert printed["agreement_on"]["images"] == 20


def test_flags_reach_the_result(cli: Cli, tmp_path: Path) -> None:
    args = ["--bits", "4", "--attention", "int8", "--calibration", "smi", "--images", "3"]
    printed = cli.quantize(tmp_path / "out", *args, "--json").json
    assert (printed["scheme"], printed["attention"]) == ("w4a8", "int8")
    assert (printed["calibration"]["method"], printed["calibration"]["images"]) == ("smi", 3)
    args = ["--activations", "symmetric", "--no-evaluate"]
    assert cli.quantize(tmp_path / "other", *args, "--json").json["scheme"] == "w8a8-symmetric"


def test_progress_goes_to_stderr(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--json")
    assert "Inverting 4 images (pri): 4/4 iterations" in ended.stderr
    assert "Inverting" not in ended.stdout


def test_quiet_prints_nothing(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--quiet")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")


def test_quiet_json_prints_the_result_alone(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--quiet", "--json")
    assert_schema(ended.json, QuantizeResult)
    assert ended.stderr == ""


def test_the_table_says_what_people_ask(cli: Cli, tmp_path: Path, labeled_npz: Path) -> None:
    shown = cli.quantize(tmp_path / "out", "--eval", labeled_npz).stdout
    for part in (MODEL, "w8a8", "4 images, pri, made now", "times smaller", "top-1", "agreement"):
        assert part in shown


def test_the_second_quantization_says_that_it_used_the_cache(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "first")
    ended = cli.quantize(tmp_path / "second")
    assert "Found 4 images in" in ended.stderr
    assert "from the cache" in ended.stdout


def test_the_second_quantization_is_cached_and_the_same(cli: Cli, tmp_path: Path) -> None:
    first = cli.quantize(tmp_path / "first", "--json").json["calibration"]
    second = cli.quantize(tmp_path / "second", "--json").json["calibration"]
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["path"] == second["path"]
    one, two = (tmp_path / d / "model.safetensors" for d in ("first", "second"))
    assert one.read_bytes() == two.read_bytes()


def test_other_bits_share_the_cached_images(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "eight", "--bits", "8")
    assert cli.quantize(tmp_path / "four", "--bits", "4", "--json").json["calibration"]["cached"]


def test_another_seed_makes_other_images(cli: Cli, tmp_path: Path) -> None:
    first = cli.quantize(tmp_path / "a", "--seed", "0", "--json").json["calibration"]
    second = cli.quantize(tmp_path / "b", "--seed", "1", "--json").json["calibration"]
    assert not second["cached"]
    assert first["path"] != second["path"]


def test_the_cache_can_be_named(cli: Cli, tmp_path: Path) -> None:
    printed = cli.quantize(tmp_path / "out", "--cache", tmp_path / "cache", "--json").json
    assert Path(printed["calibration"]["path"]).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("args", [["--bits", "4"], ["--attention", "int8"]], ids=str)
def test_the_recipe_of_a_checkpoint_makes_the_same_checkpoint(
    args: list[str], cli: Cli, tmp_path: Path
) -> None:
    cli.quantize(tmp_path / "first", *args)
    recipe = tmp_path / "first" / "recipe.toml"
    ended = cli(
        "quantize", *cli.model, "--recipe", recipe, "--out", tmp_path / "second",
        "--cache", tmp_path / "cache", "--json",
    )  # fmt: skip
    assert not ended.json["calibration"]["cached"]
    one, two = (tmp_path / d / "model.safetensors" for d in ("first", "second"))
    assert one.read_bytes() == two.read_bytes()


def test_flags_win_over_the_recipe(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[quantization]\nbits = 4\n[inversion]\nimages = 9\n")
    printed = cli.quantize(tmp_path / "out", "--recipe", tmp_path / "r.toml", "--json").json
    assert (printed["scheme"], printed["calibration"]["images"]) == ("w4a8", 4)


def test_the_output_is_named_after_model_and_scheme(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("quantize", *cli.model, *FAST, "--bits", "4", "-q").code == 0
    assert (tmp_path / f"{MODEL}-w4a8" / "config.json").is_file()


def test_an_older_checkpoint_is_replaced(cli: Cli, tmp_path: Path) -> None:
    cli.quantize(tmp_path / "out", "--bits", "8")
    assert cli.quantize(tmp_path / "out", "--bits", "4").code == 0
    assert dfq.load(tmp_path / "out").settings.bits == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_gate_that_fails_exits_with_1_and_prints_the_result(
    cli: Cli, tmp_path: Path, labeled_npz: Path
) -> None:
    ended = cli.quantize(tmp_path / "out", "--eval", labeled_npz, "--min-accuracy", "0.8", "--json")
    assert ended.code == 1
    assert_schema(ended.json, QuantizeResult)
    assert "below the bound of 0.8" in ended.stderr


def test_a_gate_that_fails_shows_the_table(cli: Cli, tmp_path: Path, labeled_npz: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--eval", labeled_npz, "--min-accuracy", "0.8")
    assert ended.code == 1
    assert "top-1" in ended.stdout


def test_a_gate_that_holds_exits_with_0(cli: Cli, tmp_path: Path) -> None:
    assert cli.quantize(tmp_path / "out", "--min-agreement", "0").code == 0


def test_images_of_ones_own_calibrate(cli: Cli, tmp_path: Path, labeled_npz: Path) -> None:
    printed = cli.quantize(tmp_path / "out", "--calibration", labeled_npz, "--json").json
    assert printed["calibration"] == {
        "method": "images",
        "images": 4,
        "path": str(labeled_npz),
        "cached": None,
    }


def test_an_inverted_dataset_calibrates(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images", "--method", "dmi")
    printed = cli.quantize(tmp_path / "out", "--calibration", tmp_path / "images", "--json").json
    assert (printed["calibration"]["method"], printed["calibration"]["images"]) == ("dmi", 4)


def test_a_dataset_of_another_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli.invert("--out", tmp_path / "images")
    state = load_file(cli.weights)
    state["head.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    ended = cli.quantize(
        tmp_path / "out",
        *("--calibration", tmp_path / "images", "--weights", tmp_path / "other.safetensors"),
    )
    assert ended.code == 2
    assert "made from another model" in ended.stderr
    assert not (tmp_path / "out").exists()
