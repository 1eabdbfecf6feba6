"""Tables of ``knowledge-transfer``."""

from __future__ import annotations

import statistics
from typing import Any

from calibration_bench.core.registry import Row, Table
from calibration_bench.core.tables import by_file, groups

ABOUT = (
    "comparison", "model", "fingerprint", "data", "data_digest", "test_images", "float_accuracy",
    "student", "depth", "width", "heads", "start", "began_with", "parameters", "steps", "batch",
    "images", "budget", "one_class", "precision", "threads",
)  # fmt: skip

COLUMNS = {
    "source": "trained on",
    "iterations": "T",
    "made": "images",
    "invert_seconds": "s to make",
    "train_seconds": "s to train",
    "seeds": "seeds",
    "accuracy": "top-1, %",
    "accuracy_error": "± over seeds",
    "agreement": "agreement with the teacher, %",
    "agreement_error": "± over seeds, agreement",
    "kl": "KL",
    "last_loss": "last loss",
}

TIMED = {"unit_images": "images of a unit", "unit_seconds": "s of a unit, before"}

ONE_CLASS = {
    "own_accuracy": "its class, %",
    "others_accuracy": "the others, %",
    "others_accuracy_error": "± over seeds, others",
    "teacher_others_accuracy": "teacher on the others, %",
    "others_found": "others that are found",
    "others": "of",
}

SHARES = ("accuracy", "agreement", "own_accuracy", "others_accuracy", "teacher_others_accuracy")
SPREADS = ("accuracy", "agreement", "others_accuracy")

NOTES = {
    "count": "As many images of every source; one of PRI with v stages has 1/v of the patches.",
    "time": (
        "As many whole units of images as the seconds of inversion yield by the time of one unit "
        "measured before, and at least one; *s to make* is what they then took."
    ),
    "class": (
        "All images are of one class; the teacher's predictions for them are all that speaks of "
        "the others. *Others that are found*: classes of which the student names at least one "
        "test image rightly."
    ),
}


def transfer_tables(rows: list[Row]) -> list[Table]:
    """Return tables for each comparison, model and student, with a row for every source."""
    return [
        _table(dict(zip(ABOUT, values, strict=True)), same)
        for values, same in groups(rows, *ABOUT).items()
    ]


def _table(about: dict[str, Any], rows: list[Row]) -> Table:
    comparison = about["comparison"]
    extra = {"time": TIMED, "class": ONE_CLASS}.get(comparison, {})
    images = f"{about['images']} images"
    if comparison == "time":
        images = f"{about['budget']:g} s of inversion"
    elif comparison == "class":
        images += f" of class {about['one_class']}"
    title = (
        f"{images}: {_student(about)}, {about['steps']} steps of {about['batch']}, taught by "
        f"{about['model']} (top-1 {100 * about['float_accuracy']:.2f} %), tested on "
        f"{about['test_images']} of {about['data']}"
    )
    means = [_mean(part) for part in groups(by_file(rows), "source", "iterations", "real").values()]
    return Table(title, {**COLUMNS, **extra}, means, NOTES[comparison])


def _student(about: dict[str, Any]) -> str:
    changed = [f"{n} {about[n]}" for n in ("depth", "width", "heads") if about[n] is not None]
    size = f"{about['parameters'] / 1e6:.2f} M parameters"
    begun = "blocks of the teacher's" if about["began_with"] == "teacher" else "random weights"
    name = about["student"] or "a student like its teacher"
    return ", ".join([name, *changed, size, f"begun with {begun}"])


def _mean(rows: list[Row]) -> Row:
    """Return means over seeds, shares in percent, with standard deviations."""
    numeric = {*COLUMNS, *TIMED, *ONE_CLASS} - {"source", "iterations", "seeds"}
    means: Row = {n: rows[0][n] for n in ("source", "iterations")} | {"seeds": len(rows)}
    for name in sorted(numeric):
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if values:
            scale = 100 if name in SHARES else 1
            means[name] = scale * statistics.mean(values)
            if name in SPREADS and len(values) > 1:
                means[f"{name}_error"] = scale * statistics.stdev(values)
    return means
