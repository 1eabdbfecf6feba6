"""Latencies are taken in turns, and no function takes more than its time."""

from __future__ import annotations

import pytest

from dfq import timing
from dfq.timing import Sampler, interleave, turns_of


class Clock:
    """A clock that functions move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, [""] * 0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def sampler(self, seconds: float, limit: float, name: str = "a", fails: int = 0) -> Sampler:
        """A function that takes ``seconds``, and fails at its call of number ``fails``."""

        def run() -> None:
            self.now += seconds
            self.calls.append(name)
            if fails and self.calls.count(name) == fails:
                raise RuntimeError("no memory")

        return Sampler(run, limit)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def nothing(_: int) -> None:
    pass


def test_functions_take_turns(clock: Clock) -> None:
    samplers = [clock.sampler(0.0625, 2, name) for name in ("a", "b")]
    interleave(samplers, 2, nothing)
    warm, timed = clock.calls[: 2 * timing.WARM_UP], clock.calls[2 * timing.WARM_UP :]
    assert warm == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP
    assert timed[:10] == (["a"] * 5 + ["b"] * 5)  # the first of a turn is not counted
    for sampler in samplers:
        assert set(sampler.times) == {0.0625}
        assert sampler.warm


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.26, 0.9, 1.7, 3.0, 4.9])
def test_all_calls_keep_within_the_limit_but_for_one(seconds: float, clock: Clock) -> None:
    sampler = clock.sampler(seconds, 5.0)
    interleave([sampler], 5.0, nothing)
    assert clock.now <= 5.0 + seconds + 1e-9
    assert sampler.times
    assert sampler.warm


def test_a_function_that_takes_longer_than_the_limit_is_called_once(clock: Clock) -> None:
    sampler = clock.sampler(60.0, 5.0)
    interleave([sampler], 5.0, nothing)
    assert (clock.calls, sampler.times, sampler.warm) == (["a"], [60.0], False)


def test_a_function_with_time_for_one_more_call_is_counted_after_a_warm_up(clock: Clock) -> None:
    sampler = clock.sampler(3.0, 5.0)
    interleave([sampler], 5.0, nothing)
    assert (clock.calls, sampler.times, sampler.warm) == (["a", "a"], [3.0], True)


@pytest.mark.parametrize("fails", [1, 3, 4, 6, 9])
def test_a_function_that_fails_is_left_alone(fails: int, clock: Clock) -> None:
    samplers = [clock.sampler(0.125, 2, "a", fails), clock.sampler(0.125, 2, "b")]
    interleave(samplers, 2, nothing)
    assert str(samplers[0].failure) == "no memory"
    assert clock.calls.count("a") == fails
    assert samplers[1].failure is None
    assert samplers[1].times


def test_progress_is_a_step_a_turn(clock: Clock) -> None:
    steps: list[int] = []
    interleave([clock.sampler(60.0, 5), clock.sampler(0.1, 5)], 5, steps.append)
    assert sum(steps) == 2 * turns_of(5)


def test_fast_functions_are_counted_under_the_shortest_limit() -> None:
    sampler = Sampler(lambda: None, 1e-9)
    interleave([sampler], 1e-9, nothing)
    assert len(sampler.times) >= 1
