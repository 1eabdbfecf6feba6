"""Schedules of methods, and units of work."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import SettingError
from dfq.inversion import events, plan_units
from dfq.inversion.schedule import fit_stages
from dfq.recipe import InversionSettings


@given(stages=st.integers(1, 20), patches=st.integers(20, 600), total=st.integers(20, 500))
@settings(deadline=None, derandomize=True)
def test_pri_stages_share_out_all_patches(stages: int, patches: int, total: int) -> None:
    schedule = events(InversionSettings(stages=stages, iterations=total), patches)
    assert sum(e.count for e in schedule) == patches
    assert all(e.kept for e in schedule)
    assert schedule[-1].iteration == total
    assert all(a.iteration < b.iteration for a, b in pairwise(schedule))
    assert max(e.count for e in schedule) - min(e.count for e in schedule) <= 1


def test_pri_follows_the_rounding_rule_at_uneven_divisions() -> None:
    schedule = events(InversionSettings(stages=7, iterations=100), 256)
    assert [e.count for e in schedule] == [37, 36, 37, 36, 37, 36, 37]
    assert [e.iteration for e in schedule] == [14, 29, 43, 57, 71, 86, 100]


def test_smi_drops_thirty_percent_four_times() -> None:
    schedule = events(InversionSettings(method="smi", iterations=4000), 196)
    assert [(e.iteration, e.kept) for e in schedule] == [
        (50, False),
        (100, False),
        (200, False),
        (300, False),
        (4000, True),
    ]
    assert schedule[-1].count == 47
    assert sum(e.count for e in schedule) == 196


def test_dmi_keeps_all_patches_to_the_end() -> None:
    (event,) = events(InversionSettings(method="dmi", iterations=70), 196)
    assert (event.iteration, event.count, event.kept) == (70, 196, True)


def test_noise_is_not_optimized() -> None:
    (event,) = events(InversionSettings(method="noise"), 196)
    assert (event.iteration, event.count) == (0, 196)


def test_more_stages_than_patches_are_refused() -> None:
    with pytest.raises(SettingError, match=r"17.*16 patches"):
        events(InversionSettings(stages=17), 16)


def test_more_stages_than_iterations_are_refused() -> None:
    with pytest.raises(SettingError, match="only 3 iterations"):
        events(InversionSettings(stages=4, iterations=3), 16)


@given(
    method=st.sampled_from(["pri", "smi", "dmi", "noise"]),
    images=st.integers(1, 200),
    stages=st.integers(1, 8),
    unit=st.integers(1, 9),
)
@settings(deadline=None, derandomize=True)
def test_units_yield_exactly_the_images_asked_for(
    method: str, images: int, stages: int, unit: int
) -> None:
    chosen = InversionSettings(
        method=method,
        images=images,
        stages=stages,
        unit_size=unit,
    )
    units = plan_units(chosen, 49)
    assert sum(u.images for u in units) == images
    assert sum(sum(u.shards.values()) for u in units) == images
    assert all(u.trajectories == unit for u in units[:-1])
    assert all(len(row) for u in units for row in u.sizes)
    firsts = [u.first_trajectory for u in units]
    assert firsts == [i * unit for i in range(len(units))]


def test_a_surplus_is_dropped_from_the_last_trajectory_alone() -> None:
    units = plan_units(InversionSettings(images=6, stages=4, unit_size=4), 16)
    assert [len(row) for row in units[0].sizes] == [4, 2]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0.0625, 0.25, 0.5625), [3, 12, 27, 48]), ((0.5, 0.7, 0.9), [24, 34, 43, 48])],
    ids=["early", "late"],
)
def test_pri_images_leave_when_they_are_told(
    shares: tuple[float, ...], expected: list[int]
) -> None:
    schedule = events(InversionSettings(leave_at=shares), 196)
    assert [e.iteration for e in schedule] == expected
    assert [e.count for e in schedule] == [49] * 4


@pytest.mark.parametrize(
    "shares",
    [(0.5,), (0.25, 0.5, 0.75, 0.9), (0.5, 0.25, 0.75), (0.25, 0.5, 1.0), (0.0, 0.5, 0.75)],
    ids=["too-few", "too-many", "falling", "at-the-end", "at-once"],
)
def test_times_that_do_not_fit_the_stages_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="takes 3 shares of T"):
        events(InversionSettings(leave_at=shares), 196)


def test_dmi_saves_snapshots_at_equal_steps() -> None:
    schedule = events(InversionSettings(method="dmi", iterations=10, snapshots=4), 196)
    assert [(e.iteration, e.stays) for e in schedule] == [
        (2, True),
        (5, True),
        (8, True),
        (10, False),
    ]
    assert {(e.count, e.kept) for e in schedule} == {(196, True)}
    with pytest.raises(SettingError, match=r"snapshots is 4.*3 iterations"):
        events(InversionSettings(method="dmi", iterations=3, snapshots=4), 196)


def test_snapshots_are_images_of_their_trajectory() -> None:
    settings = InversionSettings(method="dmi", snapshots=3, images=7, unit_size=2)
    assert [u.sizes for u in plan_units(settings, 9)] == [((9, 9, 9), (9, 9, 9)), ((9,),)]


@given(
    stages=st.integers(1, 8), patches=st.integers(1, 8), total=st.integers(1, 8),
    images=st.integers(1, 20),
)  # fmt: skip
def test_fitted_stages_are_the_most_that_can_be_and_no_more_than_asked(
    stages: int, patches: int, total: int, images: int
) -> None:
    asked = InversionSettings(stages=stages, iterations=total, images=images)
    fitted = fit_stages(asked, patches)
    assert fitted.stages == min(stages, patches, total)
    schedule = events(fitted, patches)
    assert all(event.count > 0 for event in schedule)
    assert sum(event.count for event in schedule) == patches
    assert sum(unit.images for unit in plan_units(fitted, patches)) == images
    if fitted == asked:
        return
    with pytest.raises(SettingError, match=rf"There are {stages} stages, but only"):
        events(asked, patches)


def test_stages_with_times_of_their_own_are_left_alone() -> None:
    asked = InversionSettings(leave_at=(0.25, 0.5, 0.75))
    assert fit_stages(asked, 2) == asked
