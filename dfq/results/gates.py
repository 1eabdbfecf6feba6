"""Gates (bounds on measured results), and warnings about measured results."""

from __future__ import annotations

from dfq.argument_names import option
from dfq.errors import GateError, SettingError
from dfq.results.intervals import images_to_decide, share_interval
from dfq.results.tables import MADE
from dfq.results.values import (
    AgreementOn,
    EvaluateResult,
    FloatQuantized,
    GateCheck,
    Metric,
    QuantizeResult,
)

LOW_AGREEMENT = 0.9
"""Agreement gets a warning if its whole 95 % interval is below this value.

Of 32 images of fractal noise at most 24 then agree; of models that agree with the float model
on at least 98 % of real images 27 to 32 did (docs/quantization.md).
"""

MAX_ERROR = 0.5
"""``error_over_spread`` above this value, on images that dfq made, gets a warning.

It was 0.05 to 0.2 on fractal noise for the models above, and 1.2 and more where agreement on
real images falls to 97 % and below, though the classes of all 32 images may still agree.
"""


def _advice() -> str:
    return f" Measure it on real images ({option('eval', metavar='DATA')})."


_WHAT = {"agreement": "Agreement with the float model", "accuracy": "Top-1 accuracy"}


def check_shares(**bounds: float | None) -> None:
    """Raise :class:`SettingError` for a bound that is not from 0 to 1."""
    for name, value in bounds.items():
        if value is not None and not 0 <= value <= 1:
            raise SettingError(f"{option(name)} is {value}; it is a share from 0 to 1.")


def decides(bound: float, images: int) -> bool:
    """Whether a number of images can show a share of at least ``bound``."""
    needed = images_to_decide(bound)
    return needed is not None and images >= needed


def check_decidable(name: str, bound: float | None, images: int, advice: str) -> None:
    """Raise :class:`SettingError` if ``images`` cannot keep the bound called ``name`` even where
    all of them count; ``advice`` says how to have more of them."""
    if bound is None or decides(bound, images):
        return
    needed = images_to_decide(bound)
    if needed is None:
        raise SettingError(
            f"{option(name)} is {bound:g}, which no number of images can show: it is compared "
            "with the lower end of a 95 % interval. Give a bound below 1."
        )
    lowest = share_interval(images, images)[0]
    raise SettingError(
        f"{option(name)} is {bound:g}, which {images} images cannot decide: even if all of them "
        f"count, the 95 % interval begins at {lowest:.3f}. It takes at least {needed} "
        f"images: {advice}."
    )


def check_bounds_decidable(
    metric: Metric, min_agreement: float | None, min_accuracy: float | None, images: int, data: str
) -> None:
    """:func:`check_decidable` of both bounds for data that the parameter called ``data`` gives."""
    advice = f"give more data ({option(data)}), or a lower bound"
    if metric != "cosine":  # the interval of a mean depends on its values
        check_decidable("min_agreement", min_agreement, images, advice)
    check_decidable("min_accuracy", min_accuracy, images, advice)


def check_bounds(
    agreement: AgreementOn | None,
    accuracy: FloatQuantized | None,
    min_agreement: float | None,
    min_accuracy: float | None,
) -> list[GateCheck]:
    """Compare each bound that was set with the lower end of its 95 % interval."""
    checks = []
    if min_agreement is not None:
        value = None if agreement is None else agreement.agreement
        interval = None if agreement is None else agreement.interval
        checks.append(_check("agreement", value, interval, min_agreement))
    if min_accuracy is not None:
        value = None if accuracy is None else accuracy.quantized
        interval = None if accuracy is None else accuracy.interval
        checks.append(_check("accuracy", value, interval, min_accuracy))
    return checks


def _check(what: str, value: float | None, interval: list[float] | None, bound: float) -> GateCheck:
    passed = value is not None and interval is not None and interval[0] >= bound
    return GateCheck(what, value, interval, bound, passed)


def gate(result: QuantizeResult | EvaluateResult) -> None:
    """Raise :class:`GateError`, which carries the result, if a bound of it is not kept."""
    missed = [_explain(check) for check in result.gate if not check.passed]
    if missed:
        raise GateError(" ".join(missed), result)


def _explain(check: GateCheck) -> str:
    what = _WHAT[check.what]
    if check.value is None or check.interval is None:
        return f"{what} could not be measured, so that it does not keep the bound of {check.bound}."
    low, high = check.interval
    return (
        f"{what} is {check.value:.4f} with a 95 % interval of {low:.4f} to {high:.4f}, whose lower "
        f"end is below the bound of {check.bound}."
    )


def doubts(*measured: AgreementOn | None) -> list[str]:
    """Return warnings about a quantized model's agreement, or about its measurement."""
    known = [on for on in measured if on is not None]
    warnings = [
        text for on in known for text in (*unmeasured(on), *_low_agreement(on), *_large_error(on))
    ]
    intervals = [on.interval for on in known if on.interval is not None and on.metric != "cosine"]
    if len(intervals) > 1 and max(i[0] for i in intervals) > min(i[1] for i in intervals):
        shares = " and ".join(f"{on.agreement:.4f} on {_images(on)}" for on in known)
        warnings.append(
            f"Agreement with the float model is {shares}: further apart than chance explains."
            f"{_advice()}"
        )
    return warnings


def unmeasured(on: AgreementOn) -> list[str]:
    """Return warnings about images on which agreement could not be measured."""
    warnings = []
    if on.not_finite:
        warnings.append(
            f"Outputs are not finite on {on.not_finite} of {_images(on)}; they do not agree there."
        )
    if on.agreement is None:
        warnings.append(
            f"The float model's outputs do not differ between {_images(on)}; any model would agree "
            "with them, so agreement was not measured."
        )
    return warnings


def _low_agreement(on: AgreementOn) -> list[str]:
    if on.interval is None or on.interval[1] >= LOW_AGREEMENT:
        return []
    low, high = on.interval
    advice = _advice() if on.data in MADE else ""
    return [
        f"Agreement with the float model is {on.agreement:.4f} on {_images(on)}, with a 95 % "
        f"interval of {low:.4f} to {high:.4f}.{advice}"
    ]


def _large_error(on: AgreementOn) -> list[str]:
    error = on.error_over_spread
    if on.data not in MADE or error is None or error <= MAX_ERROR:
        return []
    return [
        f"On {_images(on)} the outputs are off by {error:.2g} of what the float model's differ by "
        f"between images.{_advice()}"
    ]


def _images(on: AgreementOn) -> str:
    return f"{on.images} {MADE.get(on.data, f'images of {on.data}')}"
