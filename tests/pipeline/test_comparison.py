"""Accuracy and agreement, on logits that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfq.pipeline.comparison import (
    Accuracy,
    Comparison,
    Metric,
    compare,
    dense_batches,
    sparse_batches,
    split_at,
)
from dfq.results.intervals import share_interval
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Preprocessing
from dfq.vit.convert import convert
from dfq.vit.load import LoadedModel


class Fixed:
    """Model with given logits, batch by batch."""

    def __init__(self, *batches: list[list[float]]) -> None:
        self.batches = [torch.tensor(b, dtype=torch.float32) for b in batches]


def run(
    quantized: Fixed,
    reference: Fixed | None,
    *labels: list[int] | None,
    advance: Any = None,
    metric: Metric = "top1",
) -> Comparison:
    batches: Any = [
        (lambda model, i=i: model.batches[i], None if y is None else torch.tensor(y))
        for i, y in enumerate(labels)
    ]
    ours: Any = quantized
    theirs: Any = reference
    return compare(ours, theirs, batches, advance, metric=metric)


def one_hot(*classes: int, count: int = 7) -> list[list[float]]:
    """Logits that fall from each class on, cyclically: 3 -> 3, 4, 5, 6, 0, 1, 2."""
    return [[-float((c - k) % count) for c in range(count)] for k in classes]


def test_top1_is_the_share_of_labels_that_come_first() -> None:
    comparison = run(Fixed(one_hot(0, 1, 2, 3)), None, [0, 1, 0, 0])
    assert comparison.quantized is not None
    assert comparison.quantized.top1 == 0.5


def test_top5_is_the_share_of_labels_among_the_first_five() -> None:
    comparison = run(Fixed(one_hot(0, 0, 0, 0)), None, [0, 4, 5, 6])
    assert comparison.quantized == Accuracy(top1=0.25, top5=0.5)


def test_top5_of_fewer_classes_counts_all_of_them() -> None:
    comparison = run(Fixed(one_hot(0, 1, count=3)), None, [2, 2])
    assert comparison.quantized == Accuracy(top1=0.0, top5=1.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data(), classes=st.integers(2, 9), count=st.integers(1, 6))
def test_of_equal_logits_the_lowest_class_comes_first(
    data: st.DataObject, classes: int, count: int
) -> None:
    draw = st.lists(st.integers(0, 2).map(float), min_size=classes, max_size=classes)
    logits = data.draw(st.lists(draw, min_size=count, max_size=count))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    orders = [[c for _, c in sorted((-x, c) for c, x in enumerate(row))] for row in logits]
    first, five = (
        sum(label in order[:most] for label, order in zip(labels, orders, strict=True)) / count
        for most in (1, 5)
    )
    assert run(Fixed(logits), None, labels).quantized == Accuracy(first, five)


def test_the_float_model_has_its_own_accuracy() -> None:
    comparison = run(Fixed(one_hot(0, 1)), Fixed(one_hot(0, 2)), [0, 1])
    assert (comparison.quantized, comparison.float) == (Accuracy(1.0, 1.0), Accuracy(0.5, 0.5))


def test_agreement_is_the_share_of_equal_first_classes() -> None:
    comparison = run(Fixed(one_hot(0, 1, 2, 3)), Fixed(one_hot(0, 1, 2, 6)), [6, 6, 6, 6])
    assert comparison.agreement == 0.75


def test_agreement_needs_no_labels() -> None:
    comparison = run(Fixed(one_hot(0, 1)), Fixed(one_hot(0, 2)), None)
    assert (comparison.agreement, comparison.float, comparison.quantized) == (0.5, None, None)


def test_without_a_float_model_there_is_no_agreement() -> None:
    comparison = run(Fixed(one_hot(0, 1)), None, [0, 1])
    assert (comparison.agreement, comparison.kl, comparison.float) == (None, None, None)


def test_without_images_there_is_nothing_to_say() -> None:
    assert run(Fixed(), Fixed()) == Comparison(0, "top1", None, None, 0.0, None, None)


def test_unlabeled_images_among_labeled_ones_leave_no_accuracy() -> None:
    model = Fixed(one_hot(0), one_hot(1))
    comparison = run(model, model, [0], None)
    assert (comparison.quantized, comparison.float, comparison.agreement) == (None, None, 1.0)


def test_kl_is_that_of_the_quantized_from_the_float_prediction() -> None:
    ours, theirs = [[math.log(0.5), math.log(0.5)]], [[math.log(0.9), math.log(0.1)]]
    comparison = run(Fixed(ours), Fixed(theirs), None)
    assert comparison.kl == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))


def test_kl_is_a_mean_over_images() -> None:
    ours, theirs = [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [5.0, 0.0]]
    single = run(Fixed(ours[1:]), Fixed(theirs[1:]), None).kl
    assert single is not None
    assert run(Fixed(ours), Fixed(theirs), None).kl == pytest.approx(single / 2)


def test_kl_does_not_change_with_a_shift_of_the_logits() -> None:
    ours = Fixed([[1.0, 2.0, 4.0]])
    shifted = Fixed([[101.0, 102.0, 104.0]])
    assert run(ours, shifted, None).kl == pytest.approx(0, abs=1e-6)


LOGITS = st.lists(
    st.lists(st.integers(-4, 4).map(float), min_size=6, max_size=6), min_size=1, max_size=9
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logits=LOGITS, data=st.data())
def test_batches_do_not_matter(logits: list[list[float]], data: st.DataObject) -> None:
    count = len(logits)
    labels = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    size = data.draw(st.integers(1, count))
    theirs = logits[::-1]
    starts = range(0, count, size)
    whole = run(Fixed(logits), Fixed(theirs), labels)
    parts = run(
        Fixed(*(logits[i : i + size] for i in starts)),
        Fixed(*(theirs[i : i + size] for i in starts)),
        *(labels[i : i + size] for i in starts),
    )
    assert (parts.images, parts.agreement) == (whole.images, whole.agreement)
    assert (parts.quantized, parts.float) == (whole.quantized, whole.float)
    assert parts.kl == pytest.approx(whole.kl, abs=1e-5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logits=LOGITS)
def test_a_model_agrees_with_itself(logits: list[list[float]]) -> None:
    assume(len(logits) == 1 or logits != [logits[0]] * len(logits))
    comparison = run(Fixed(logits), Fixed(logits), None)
    assert (comparison.agreement, comparison.kl) == (1.0, 0.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logits=LOGITS, data=st.data())
def test_shares_lie_where_they_can(logits: list[list[float]], data: st.DataObject) -> None:
    count = len(logits)
    labels = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    comparison = run(Fixed(logits), Fixed(logits[::-1]), labels)
    assert comparison.quantized is not None
    assert comparison.kl is not None
    assert 0 <= comparison.quantized.top1 <= comparison.quantized.top5 <= 1
    assert comparison.kl > -1e-6


# ---- outputs that cannot be compared

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("of_float", [False, True])
def test_images_without_finite_logits_agree_with_nothing(bad: float, of_float: bool) -> None:
    good = one_hot(0, 1, 2, 3)
    spoilt = [*good[:3], [bad, *good[3][1:]]]
    ours, theirs = (good, spoilt) if of_float else (spoilt, good)
    comparison = run(Fixed(ours), Fixed(theirs), [0, 1, 2, 3])
    assert (comparison.agreement, comparison.agreeing, comparison.not_finite) == (0.75, 3, 1)
    assert comparison.interval == share_interval(3, 4)
    assert (comparison.kl, comparison.error_over_spread) == (0.0, 0.0)
    assert comparison.quantized == Accuracy(*([1.0, 1.0] if of_float else [0.75, 0.75]))
    assert comparison.float == Accuracy(*([0.75, 0.75] if of_float else [1.0, 1.0]))


@pytest.mark.parametrize("metric", ["top1", "threshold", "cosine"])
@pytest.mark.parametrize("of_float", [False, True])
def test_a_model_without_finite_outputs_agrees_with_nothing(metric: Metric, of_float: bool) -> None:
    good = [[1.0], [-2.0], [3.0]] if metric == "threshold" else one_hot(0, 1, 2)
    spoilt = [[NAN] * len(row) for row in good]
    ours, theirs = (good, spoilt) if of_float else (spoilt, good)
    comparison = run(Fixed(ours), Fixed(theirs), None, metric=metric)
    counted = None if metric == "cosine" else 0
    assert (comparison.agreement, comparison.agreeing, comparison.not_finite) == (0.0, counted, 3)
    assert comparison.interval == ((0.0, 0.0) if metric == "cosine" else share_interval(0, 3))
    assert (comparison.kl, comparison.error_over_spread, comparison.constant) == (None, None, False)


@pytest.mark.parametrize("metric", ["top1", "threshold", "cosine"])
def test_agreement_with_outputs_that_do_not_differ_is_not_measured(metric: Metric) -> None:
    row = [0.7] if metric == "threshold" else [0.1, 0.2, 0.7]
    theirs = [row, row, [value * (1 + 1e-8) for value in row]]
    comparison = run(Fixed(theirs), Fixed(theirs), [0, 0, 0], metric=metric)
    assert comparison.constant
    assert (comparison.agreement, comparison.agreeing, comparison.interval) == (None, None, None)
    assert (comparison.error_over_spread, comparison.threshold) == (None, None)


def test_outputs_that_do_not_differ_of_the_quantized_model_are_measured() -> None:
    comparison = run(Fixed(one_hot(0, 0, 0, 0)), Fixed(one_hot(0, 1, 2, 3)), None)
    assert (comparison.agreement, comparison.constant) == (0.25, False)


def test_the_error_is_relative_to_the_spread_of_the_float_outputs() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(9, 4)) + 5
    ours = theirs + 0.1 * rng.normal(size=(9, 4))
    comparison = run(Fixed(ours.tolist()), Fixed(theirs.tolist()), None)
    spread = np.square(theirs - theirs.mean(0)).mean()
    expected = math.sqrt(np.square(ours - theirs).mean() / spread)
    assert comparison.error_over_spread == pytest.approx(expected, rel=1e-4)


# ---- one logit


def single(*logits: float) -> Fixed:
    return Fixed([[value] for value in logits])


def threshold(
    ours: tuple[float, ...], theirs: tuple[float, ...], labels: list[int] | None = None
) -> Comparison:
    return run(single(*ours), single(*theirs), labels, metric="threshold")


def test_labeled_logits_are_told_apart_at_0() -> None:
    comparison = threshold((1.0, 2.0, -1.0, -0.1), (1.0, -2.0, -1.0, 0.1), [1, 1, 0, 0])
    assert (comparison.threshold, comparison.agreement, comparison.agreeing) == (0.0, 0.5, 2)
    assert (comparison.quantized, comparison.float) == (Accuracy(1.0, 1.0), Accuracy(0.5, 1.0))


def test_a_logit_of_0_is_class_0() -> None:
    smallest = 1e-45
    comparison = threshold((0.0, -0.0, smallest, 0.0), (0.0, 0.0, smallest, 1.0), [0, 0, 1, 1])
    assert (comparison.agreement, comparison.threshold) == (0.75, 0.0)
    assert (comparison.quantized, comparison.float) == (Accuracy(0.75, 1.0), Accuracy(1.0, 1.0))


def test_labeled_logits_on_one_side_are_told_apart_at_their_median() -> None:
    comparison = threshold((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 4.0, 5.0), [1, 1, 0, 1])
    assert (comparison.threshold, comparison.agreement) == (3.0, 0.75)
    assert comparison.quantized == comparison.float == Accuracy(0.75, 1.0)


def test_unlabeled_logits_are_told_apart_at_their_median() -> None:
    comparison = threshold((-9.0, -8.0, 7.0, 9.0), (-9.0, 1.0, 2.0, 9.0))
    assert (comparison.threshold, comparison.agreement) == (1.5, 1.0)


def test_a_logit_at_the_threshold_lies_below_it() -> None:
    assert threshold((0.0, 1.5, 2.0, 3.0), (0.0, 1.0, 2.0, 3.0)).agreement == 1.0
    assert threshold((0.0, 1.0, 1.5, 3.0), (0.0, 1.0, 2.0, 3.0)).agreement == 0.75


def test_a_model_that_puts_all_on_one_side_agrees_with_half() -> None:
    theirs = tuple(float(k) for k in range(10))
    assert threshold((100.0,) * 10, theirs).agreement == 0.5
    assert threshold((-100.0,) * 10, theirs).agreement == 0.5


def test_logits_that_are_not_finite_move_no_threshold() -> None:
    comparison = threshold((0.0, NAN, 3.0, 4.0, INF), (0.0, 1.0, 3.0, NAN, 1.0))
    assert (comparison.threshold, comparison.agreeing, comparison.agreement) == (1.5, 2, 0.4)
    assert comparison.not_finite == 3


def test_one_image_has_no_threshold_but_with_a_label() -> None:
    assert threshold((1.0,), (1.0,)).agreement is None
    assert threshold((1.0,), (1.0,), [1]).agreement is None


def test_kl_of_one_logit_is_that_of_two_bernoulli_distributions() -> None:
    p, q = (1 / (1 + math.exp(-x)) for x in (0.3, -1.2))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    comparison = run(single(-1.2), single(0.3), None, metric="threshold")
    assert comparison.kl == pytest.approx(expected, rel=1e-5)


VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12)


@given(values=VALUES)
def test_the_split_is_the_most_even_one_between_two_logits(values: list[float]) -> None:
    middle = split_at(torch.tensor(values))
    distinct = sorted(set(values))
    if middle is None:
        assert len(distinct) == 1
        return
    low, high = max(v for v in values if v < middle), min(v for v in values if v > middle)
    assert middle == (low + high) / 2
    uneven = [abs(2 * sum(v <= split for v in values) - len(values)) for split in distinct[:-1]]
    assert abs(2 * sum(v <= middle for v in values) - len(values)) == min(uneven)


@given(theirs=VALUES, data=st.data())
def test_agreement_of_one_logit_is_the_share_on_the_same_side(
    theirs: list[float], data: st.DataObject
) -> None:
    ours = data.draw(st.lists(st.floats(-2, 2), min_size=len(theirs), max_size=len(theirs)))
    labels = data.draw(st.none() | st.just([0] * len(theirs)))
    comparison = threshold(tuple(ours), tuple(theirs), labels)
    if comparison.agreement is None:
        assert comparison.threshold is None
        return
    assert comparison.threshold is not None
    a, b = (np.array(v, dtype=np.float32).astype(float) for v in (ours, theirs))
    assert comparison.agreement == np.mean((a > comparison.threshold) == (b > comparison.threshold))
    if labels is not None and 0 < np.sum(b > 0) < len(b):
        assert comparison.threshold == 0


# ---- whole models


def test_progress_counts_images() -> None:
    seen: list[int] = []
    run(Fixed(one_hot(0, 1, 2), one_hot(3)), None, [0, 1, 2], [3], advance=seen.append)
    assert seen == [3, 1]


def test_half_precision_logits_are_compared_in_float32() -> None:
    ours, theirs = Fixed([[1.0, 2.0, 4.0]]), Fixed([[1.0, 2.0, 5.0]])
    expected = run(ours, theirs, None).kl
    ours.batches[0] = ours.batches[0].bfloat16()
    assert run(ours, theirs, None).kl == pytest.approx(expected, abs=1e-6)


def test_nothing_is_kept_for_gradients() -> None:
    seen: list[bool] = []

    def logits(_: Any) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros(1, 3)

    model: Any = object()
    compare(model, model, [(logits, None)])
    assert seen == [False, False]


def test_whole_images_run_through_both_models() -> None:
    ours, theirs = convert(make_vit(seed=0), "a"), convert(make_vit(seed=1), "b")
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second = ours(images).argmax(-1), theirs(images).argmax(-1)
    batches = dense_batches([(images[:4], first[:4]), (images[4:], first[4:])], torch.device("cpu"))
    comparison = compare(ours, theirs, batches)
    agreement = float((first == second).float().mean())
    assert comparison.images == 6
    assert comparison.quantized == Accuracy(1.0, 1.0)
    assert comparison.agreement == pytest.approx(agreement)


def test_batches_may_be_collected_before_they_are_run() -> None:
    vit = convert(make_vit(), "a")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = vit(images).argmax(-1)
    pairs = [(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    comparison = compare(vit, None, list(dense_batches(pairs, torch.device("cpu"))))
    assert comparison.quantized == Accuracy(1.0, 1.0)


def test_sparse_images_run_on_the_patches_they_have(loaded: LoadedModel) -> None:
    g = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (3, 5, 48), dtype=torch.uint8, generator=g)
    positions = torch.stack([torch.randperm(16, generator=g)[:5] for _ in range(3)])
    none = torch.zeros(3, dtype=torch.int64)
    images = SparseImages(patches, positions, none, none, none)
    p: Preprocessing = loaded.preprocessing
    x = pixels_to_input(patches, p, loaded.vit.arch.grid)
    ((logits, labels),) = sparse_batches([images], loaded.vit, p)
    assert labels is None
    assert torch.equal(logits(loaded.vit), loaded.vit.forward_sparse(x, positions))
