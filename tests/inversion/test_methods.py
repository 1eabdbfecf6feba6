"""Methods and losses as values, and what a new one takes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field

from dfq.data.settings import ORIGIN
from dfq.errors import SettingError
from dfq.inversion import Engine, events, plan_units, ranking_of
from dfq.inversion.importance import MEASURES
from dfq.inversion.iteration import fused_weight
from dfq.inversion.losses import LOSSES, ImageLoss, losses_of
from dfq.inversion.losses.total_variation import TotalVariation
from dfq.inversion.runners import DeviceRunner
from dfq.inversion.schedule import fit, fit_stages, method_of, unused_fields
from dfq.inversion.schedules import METHODS, Event, Method
from dfq.inversion.schedules.method import OPTIMIZATION, RANKING, Importance
from dfq.inversion.schedules.pri import Pri
from dfq.inversion.schedules.smi import Smi
from dfq.pipeline.calibration_set import held_out_settings
from dfq.recipe import InversionSettings, load_recipe, to_dict, to_toml
from dfq.sparse import Grid, SparseImages
from dfq.validation import FROM_COMPONENT, describe, settings, with_component_fields
from dfq.vit.load import LoadedModel

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inversion.md").read_text(encoding="utf-8")


@settings
class Halving(Method):
    """Half of the live patches leave as an image, the least important first, until one is left."""

    name: ClassVar[str] = "halving"
    summary: ClassVar[str] = "half of the patches leave at a time"

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        actual: list[Event] = []
        while patches:
            count = max(1, patches // 2)
            actual.append(Event(min(iterations, len(actual) + 1), count, kept=True))
            patches -= count
        return tuple(actual)


@settings
class Brightness(ImageLoss):
    """The sum of all values, which pulls every pixel down by the same."""

    name: ClassVar[str] = "brightness"
    weight_field: ClassVar[str] = "brightness"
    brightness: float = Field(default=0.0, ge=0.0, le=1e6, description="weight")

    def bind(self, positions: torch.Tensor, grid: Grid) -> BoundBrightness:
        assert positions.max() < grid.patches
        return BoundBrightness()


class BoundBrightness:
    def set_positions(self, positions: torch.Tensor) -> None:
        pass

    def gradient(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(patches)


def chosen(**changes: Any) -> InversionSettings:
    base = InversionSettings(iterations=8, images=4, precision="float32", threads=1, unit_size=2)
    return dataclasses.replace(base, **changes)


def run(engine: Engine) -> list[SparseImages]:
    units = plan_units(engine.settings, engine.grid.patches)
    return [images for unit in units for images in engine.run(unit)]


# a new method and a new loss


def test_the_engine_runs_a_method_that_it_has_not_seen(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="allowed: pri, smi, dmi, noise"):
        chosen(method="halving")
    monkeypatch.setitem(METHODS, "halving", Halving)
    asked = chosen(method="halving", images=10)
    engine = Engine(loaded.vit, loaded.preprocessing, asked)
    images = run(engine)
    assert [batch.positions.shape for batch in images] == [(2, n) for n in (8, 4, 2, 1, 1)]
    everything = torch.cat([batch.positions for batch in images], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(16).expand(2, -1))


def test_the_engine_takes_a_list_of_losses(loaded: LoadedModel) -> None:
    asked = chosen(method="dmi", images=2, tv=0.0)
    dark = Engine(
        loaded.vit, loaded.preprocessing, asked, losses=[Brightness(brightness=1e3)]
    )  # its gradient drowns the model's, and each of Adam's steps goes down by lr
    (before,), (after,) = (
        run(Engine(loaded.vit, loaded.preprocessing, chosen(method="noise", images=2))),
        run(dark),
    )
    steps = 255 * 8 * asked.lr * torch.tensor(loaded.preprocessing.std)
    start = before.patches.float().reshape(2, 16, 3, -1)
    expected = (start - steps[:, None]).clamp(0, 255).reshape(after.patches.shape)
    assert ((after.patches.float() - expected).abs() <= 2)[before.patches < 255].all()
    (plain,) = run(Engine(loaded.vit, loaded.preprocessing, asked))
    assert after.patches.float().mean() < plain.patches.float().mean() - 25


def test_losses_add_up_and_do_not_depend_on_their_order(loaded: LoadedModel) -> None:
    pair = [TotalVariation(tv=0.5), Brightness(brightness=0.1)]
    asked = chosen(method="dmi", images=2)
    both, turned, alone = (
        run(Engine(loaded.vit, loaded.preprocessing, asked, losses=losses))[0]
        for losses in (pair, pair[::-1], pair[:1])
    )
    assert (both.patches.float() - turned.patches.float()).abs().max() <= 1
    assert (both.patches.float() - alone.patches.float()).abs().max() > 25


def test_kernels_are_used_for_total_variation_alone(loaded: LoadedModel) -> None:
    tv, other = TotalVariation(tv=0.25), Brightness(brightness=1.0)
    assert fused_weight([tv]) == 0.25
    assert fused_weight([]) == 0.0
    assert fused_weight([other]) is fused_weight([tv, other]) is None
    asked = chosen(method="dmi")
    engines = {
        fits: Engine(loaded.vit, loaded.preprocessing, asked, losses=losses)
        for fits, losses in ((True, [tv]), (False, [tv, other]))
    }
    for fits, engine in engines.items():
        assert DeviceRunner(engine.setup, graphs=False, fused=True).fused is fits
    host = run(engines[False])
    engines[False].runner = DeviceRunner(engines[False].setup, graphs=False, fused=True)
    for here, there in zip(run(engines[False]), host, strict=True):
        assert (here.patches.float() - there.patches.float()).abs().max() <= 1


METHOD_FILE = """
from typing import ClassVar

from pydantic import Field

from dfq.inversion.schedules.method import Event
from dfq.inversion.schedules.pri import Pri
from dfq.validation import settings


@settings
class Geometric(Pri):
    name: ClassVar[str] = "geometric"
    summary: ClassVar[str] = "PRI whose images grow"
    ratio: float = Field(default=2.0, ge=1.0, le=9.0, description="of one image to the one before")

    def events(self, iterations, patches):
        parts = [self.ratio**k for k in range(self.stages)]
        ends = [round(patches * sum(parts[:k]) / sum(parts)) for k in range(self.stages + 1)]
        times = self.times(iterations)
        return tuple(
            Event(at, ends[k + 1] - ends[k], True, leave_first=self.leave_first)
            for k, at in enumerate(times)
        )
"""

LOSS_FILE = """
from typing import ClassVar

from pydantic import Field

from dfq.inversion.losses.loss import ImageLoss
from dfq.validation import settings


@settings
class PixelNorm(ImageLoss):
    name: ClassVar[str] = "l2"
    weight_field: ClassVar[str] = "l2"
    l2: float = Field(default=0.0, ge=0.0, le=1e6, description="weight of each image's L2 norm")

    def bind(self, positions, grid):
        return Bound()


class Bound:
    def set_positions(self, positions):
        pass

    def gradient(self, patches):
        return patches / patches.flatten(1).norm(dim=1).clamp_min(1e-8)[:, None, None]
"""


def test_a_new_method_and_a_new_loss_are_a_file_each(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz")
    shutil.copytree(ROOT / "dfq", tmp_path / "dfq", ignore=ignored)
    for name in ("demo_vit.safetensors", "fashion_mnist_test_2k.npz"):
        (tmp_path / "dfq" / "demo" / name).symlink_to(ROOT / "dfq" / "demo" / name)
    inversion = tmp_path / "dfq" / "inversion"
    (inversion / "schedules" / "geometric.py").write_text(METHOD_FILE)
    (inversion / "losses" / "pixel_norm.py").write_text(LOSS_FILE)
    recipe = tmp_path / "new.toml"
    recipe.write_text('[inversion]\nmethod = "geometric"\nratio = 3.0\nstages = 2\nl2 = 0.5\n')
    program = (
        "import dfq.recipe as r; open('listed.toml', 'w').write(r.to_toml(r.Recipe())); "
        "from dfq.__main__ import main; main()"
    )
    command = [sys.executable, "-c", program, "invert", "demo", "--recipe", str(recipe), "--json"]
    command += ["--images", "4", "--iterations", "4", "--threads", "1", "--out", "made"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DFQ_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["method"] == "geometric"
    recorded = json.loads((tmp_path / "made" / "settings.json").read_text())["inversion"]
    assert {"method": "geometric", "ratio": 3.0, "l2": 0.5, "stages": 2}.items() <= recorded.items()
    assert not {"prune_at", "snapshots", "leave_at"} & set(recorded)
    shards = sorted(path.name for path in (tmp_path / "made").glob("shard-*"))
    assert shards == ["shard-00000-147.safetensors", "shard-00000-49.safetensors"]
    listed = (tmp_path / "listed.toml").read_text()
    assert "ratio = 2.0  # geometric: of one image to the one before" in listed
    assert re.search("stages = 4  # pri, .*geometric.*: images a trajectory yields", listed)
    assert "l2 = 0.0  # weight of each image's L2 norm" in listed


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ([Event(4, 20, True)], "20 of 16 live patches leave"),
        ([Event(4, 8, True), Event(2, 8, True)], "not in order"),
        ([Event(9, 16, True)], "not in order"),
        ([Event(4, 16, False)], "keeps no image"),
        ([Event(2, 10, True), Event(4, 10, True)], "10 of 6 live patches"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_refused(
    bad: list[Event], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Halving, "events", lambda *_: tuple(bad))
    monkeypatch.setitem(METHODS, "halving", Halving)
    with pytest.raises(SettingError, match=f"'halving' is wrong: .*{problem}"):
        events(chosen(method="halving"), 16)


def test_a_method_says_how_it_ranks(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "halving", Halving)
    measures: list[Importance] = ["random", "attention"]
    by_measure = [
        run(Engine(loaded.vit, loaded.preprocessing, chosen(method="halving", importance=measure)))
        for measure in measures
    ]
    monkeypatch.setattr(Halving, "ranking", lambda *_: "random")
    own = [
        run(Engine(loaded.vit, loaded.preprocessing, chosen(method="halving", importance=measure)))
        for measure in measures
    ]
    positions = [torch.cat([batch.positions for batch in images], 1) for images in by_measure + own]
    assert not torch.equal(positions[0], positions[1])
    assert torch.equal(positions[0], positions[2])
    assert torch.equal(positions[0], positions[3])


@pytest.mark.parametrize("measure", [*MEASURES, "auto"])
def test_a_method_that_does_not_rank_removes_all_patches_or_none(
    measure: Importance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Halving, "ranks", False)
    monkeypatch.setitem(METHODS, "halving", Halving)
    with pytest.raises(SettingError, match=r"8 of 16 live patches .* does not rank patches"):
        events(chosen(method="halving", importance=measure), 16)
    assert events(chosen(method="halving", importance=measure), 1) == (Event(1, 1, kept=True),)


@pytest.mark.parametrize("name", METHODS)
def test_methods_with_ranks_alone_are_ranked(name: str, loaded: LoadedModel) -> None:
    ranking = ranking_of(chosen(method=name), loaded.vit.arch)
    assert ranking == ("attention" if METHODS[name].ranks else None)


# the methods and losses that there are

READ = {
    "pri": {"stages", "leave_first", "leave_at", "importance"},
    "smi": {"prune_at", "prune_share", "importance"},
    "dmi": {"snapshots"},
    "noise": set[str](),
}
"""Fields of the settings that not all of these methods read, by method."""


@pytest.mark.parametrize("method", READ)
def test_a_method_reads_its_own_fields(method: str) -> None:
    optimized = {"iterations", "lr", "beta1", "beta2", "jitter", "flip", "plateau", "tv"}
    every = {*set[str]().union(*READ.values()), *optimized}
    read = READ[method] | (set() if method == "noise" else optimized)
    assert unused_fields(method) & every == every - read
    assert set(describe(InversionSettings)) >= OPTIMIZATION | RANKING


def test_settings_are_those_that_methods_and_losses_declare() -> None:
    infos = describe(InversionSettings)
    for kind in [*METHODS.values(), *LOSSES.values()]:
        for name, own in describe(kind).items():
            owners = [label for label, each in METHODS.items() if name in each.field_names()]
            text = f"{', '.join(owners)}: {own.description}" if owners else own.description
            assert infos[name] == dataclasses.replace(own, description=text)
        assert kind.from_settings(InversionSettings()) == kind()
    assert list(METHODS)[:4] == ["pri", "smi", "dmi", "noise"]
    assert infos["method"].allowed == ", ".join(METHODS)
    assert all(ORIGIN.fullmatch(name) for name in METHODS)


def test_a_method_is_a_frozen_value_with_bounds() -> None:
    with pytest.raises(SettingError, match="stages is 0; allowed: a whole number from 1 to 1024"):
        Pri(stages=0)
    own = method_of(chosen(method="smi", prune_share=0.5, prune_at=(0.5,)))
    assert own == Smi(prune_share=0.5, prune_at=(0.5,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        own.prune_share = 0.1  # type: ignore[misc]


def test_a_loss_without_weight_is_not_in_the_list() -> None:
    assert losses_of(InversionSettings()) == (TotalVariation(),)
    assert losses_of(InversionSettings(tv=0.0)) == ()


def test_the_first_name_of_a_field_is_its_meaning() -> None:
    @settings
    class Other:
        stages: int = Field(default=9, description="something else")

    @settings
    class Pri:
        stages: int = Field(default=4, description="images")

    with pytest.raises(TypeError, match=r"Pri.stages is declared differently"):
        with_component_fields([("other", Other), ("pri", Pri)])
    with pytest.raises(TypeError, match="declared twice or nowhere"):

        @settings
        @with_component_fields([("pri", Pri)])
        class Nowhere:
            stages: int = FROM_COMPONENT
            images: int = FROM_COMPONENT

    with pytest.raises(TypeError, match="declared twice or nowhere"):

        @settings
        @with_component_fields([("pri", Pri)])
        class Twice:
            stages: int = 3


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_flat_keys_of_shipped_recipes_are_read_and_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    assert to_dict(recipe)["inversion"]["method"] in METHODS


def test_stages_are_fitted_whatever_the_method_and_times_of_others_dropped() -> None:
    assert fit_stages(chosen(method="dmi", stages=9), 4).stages == 4
    times = chosen(stages=4, leave_at=(0.25, 0.5, 0.75))
    assert (fit(times, 2).stages, fit(times, 2).leave_at) == (2, ())
    assert fit(times, 16) == times


@pytest.mark.parametrize(
    ("changes", "images", "method"),
    [
        ({"stages": 3}, 6, "pri"),
        ({"stages": 30}, 16, "pri"),
        ({"method": "smi", "stages": 3}, 2, "smi"),
        ({"method": "dmi", "snapshots": 3}, 6, "dmi"),
        ({"method": "noise", "stages": 2}, 4, "pri"),
    ],
)
def test_held_out_images_are_those_of_one_unit(
    changes: dict[str, Any], images: int, method: str
) -> None:
    asked = held_out_settings(chosen(**changes), 16)
    assert (asked.images, asked.method) == (images, method)
    (unit,) = plan_units(asked, 16)
    assert unit.images == images


# documentation


@pytest.mark.parametrize("name", METHODS)
def test_the_documentation_has_a_row_for_every_method(name: str) -> None:
    kind = METHODS[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert all(f"`{field}`" in row for field in kind.field_names())
    assert kind.paper is None or kind.paper in row


@pytest.mark.parametrize("name", LOSSES)
def test_the_documentation_has_a_row_for_every_loss(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"`{LOSSES[name].weight_field}`" in row


def test_the_documented_method_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late.py").write_text(PAGE.split("```python\n")[1].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    late = importlib.import_module("late").Late
    monkeypatch.setitem(METHODS, "late", late)
    monkeypatch.delitem(sys.modules, "late")
    assert [(e.iteration, e.count) for e in late().events(100, 15)] == [(50, 7), (100, 8)]
    assert late(half_at=0.25).events(100, 15)[0].leave_first == "most"
    assert InversionSettings(method="late").method == "late"
