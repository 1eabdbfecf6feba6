"""Tables of accuracy by calibration source and by variant of quantization."""

from __future__ import annotations

from calibration_bench.registry import Row, Table
from calibration_bench.tables import groups, mean_over_seeds

COLUMNS = {
    "source": "calibrated on",
    "variant": "variant",
    "bits": "weights",
    "attention": "attention",
    "seeds": "seeds",
    "accuracy": "top-1, %",
    "worst": "worst",
    "drop": "drop, points",
    "agreement": "agreement, %",
    "kl": "KL",
    "kl_error": "± over seeds",
    "seconds": "s to invert",
}


def accuracy_tables(rows: list[Row]) -> list[Table]:
    """For each model and test set a row for every source, variant, width and attention."""
    found: list[Table] = []
    about = ("model", "fingerprint", "data", "test_images", "images", "float_accuracy")
    for values, same in groups(rows, *about).items():
        model, _, data, test_images, images, accuracy = values
        title = (
            f"{model}, {images} calibration images, tested on {test_images} of {data}, "
            f"float top-1 {100 * float(str(accuracy)):.2f} %"
        )
        parts = groups(same, "source", "variant", "bits", "attention")
        means = [_row(part) for part in parts.values()]
        means.sort(key=lambda r: (r["bits"], r["attention"], r["variant"], r["kl"]))
        found.append(Table(title, COLUMNS, means))
    return found


def _row(rows: list[Row]) -> Row:
    means = mean_over_seeds(rows)
    return {
        **means,
        **{name: rows[0][name] for name in ("variant", "bits", "attention")},
        "drop": means["float_accuracy"] - means["accuracy"],
        "worst": 100 * min(float(row["accuracy"]) for row in rows),
    }
