"""Tables and plots of accuracy by calibration source and by variant of quantization."""

from __future__ import annotations

from typing import Any

from calibration_bench.core.registry import Curve, Plot, Row, Table
from calibration_bench.core.tables import (
    TESTED,
    by_file,
    groups,
    mean_over_seeds,
    weight_range,
    width,
)

COLUMNS = {
    "source": "calibrated on",
    "iterations": "T",
    "precision": "inverted in",
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


ACCURACY = (*TESTED, "float_accuracy", "images", "threads", "reduce_range")


def accuracy_tables(rows: list[Row]) -> list[Table]:
    """Return tables for each model, test set and range of weights, with a row for every source,
    variant, bit width and attention."""
    tables: list[Table] = []
    for values, same in groups(rows, *ACCURACY).items():
        about = dict(zip(ACCURACY, values, strict=True))
        title = (
            f"{about['model']}, {about['images']} calibration images, {weight_range(about)}, "
            f"tested on {about['test_images']} of {about['data']}, float top-1 "
            f"{100 * float(str(about['float_accuracy'])):.2f} %"
        )
        alike = ("source", "real", "iterations", "precision", "variant", "bits", "attention")
        parts = groups(by_file(same), *alike)
        means = [_row(part) for part in parts.values()]
        means.sort(key=lambda r: (r["bits"], r["attention"], r["variant"], r["kl"]))
        tables.append(Table(title, COLUMNS, means))
    return tables


def _row(rows: list[Row]) -> Row:
    means = mean_over_seeds(rows)
    return {
        **means,
        **{name: rows[0][name] for name in ("precision", "variant", "bits", "attention")},
        "drop": means["float_accuracy"] - means["accuracy"],
        "worst": 100 * min(float(row["accuracy"]) for row in rows),
    }


ABOUT = (*TESTED, "float_accuracy", "threads", "precision", "reduce_range", "bits")

SOURCES = {
    "source": "calibrated on",
    "images": "images",
    "seeds": "seeds",
    "accuracy": "top-1, %",
    "accuracy_error": "± over seeds",
    "drop": "drop, points",
    "agreement": "agreement, %",
    "kl": "KL",
    "kl_error": "± over seeds, KL",
    "seconds": "s to make",
    "kilobytes": "kB on disk",
}

COVERAGE = (
    "`+coverage`: with what dfq puts beside inverted images by default (fractal noise; that noise "
    "and each trajectory's image at lower resolutions); all other rows are the named images alone. "
    "Everything else of the quantization is the same in all rows."
)


def source_tables(rows: list[Row]) -> list[Table]:
    """Return KL by number of images, then all results, for each model, test set and scheme."""
    tables: list[Table] = []
    for values, same in groups(rows, *ABOUT).items():
        about = dict(zip(ABOUT, values, strict=True))
        title = (
            f"{about['model']}, {width(about)}, tested on {about['test_images']} of "
            f"{about['data']}, float top-1 {100 * float(str(about['float_accuracy'])):.2f} %"
        )
        means = _means(same)
        tables.append(_pivot(f"KL by number of images: {title}", means))
        made = f"{title}; images made by {about['threads']} threads in {about['precision']}"
        tables.append(Table(made, SOURCES, means, COVERAGE))
    return tables


def _means(rows: list[Row]) -> list[Row]:
    """Return means over seeds of every source, number of iterations and number of images."""
    averaged = []
    parts = groups(by_file(rows), "source", "iterations", "images", "real")
    for (source, iterations, count, _), same in parts.items():
        means = mean_over_seeds(same)
        name = f"{source}, T = {iterations}" if iterations else str(source)
        size = [row["dataset_bytes"] for row in same]
        averaged.append(
            {
                **means,
                "source": name,
                "images": count,
                "drop": means["float_accuracy"] - means["accuracy"],
                "kilobytes": sum(size) / len(size) / 1e3,
            }
        )
    return sorted(averaged, key=lambda row: int(row["images"]))


def _pivot(title: str, means: list[Row]) -> Table:
    counts = list(dict.fromkeys(row["images"] for row in means))
    names = [f"kl_{count}" for count in counts]
    rows = [
        {"source": source, **{f"kl_{row['images']}": row["kl"] for row in same}}
        for (source,), same in groups(means, "source").items()
    ]
    rows.sort(key=lambda row: float(row.get(names[-1], float("inf"))))
    columns: dict[str, Any] = {"source": "calibrated on"}
    return Table(
        title,
        columns | {n: f"{c} images" for n, c in zip(names, counts, strict=True)},
        rows,
        "KL of the quantized from the float prediction, mean over seeds; less is better.",
    )


def source_plots(rows: list[Row]) -> list[Plot]:
    """Return plots of KL over the number of images, for each model and scheme."""
    plots = []
    for values, same in groups(rows, *ABOUT).items():
        about = dict(zip(ABOUT, values, strict=True))
        model, bits = about["model"], about["bits"]
        suffix = "" if about["reduce_range"] else "-full-range"
        curves = [
            Curve(
                str(source),
                [float(row["images"]) for row in points],
                [float(row["kl"]) for row in points],
                [float(row["kl_error"] or 0) for row in points],
            )
            for (source,), points in groups(_means(same), "source").items()
        ]
        plots.append(
            Plot(
                f"sources-{model}-w{bits}a8{suffix}",
                f"Calibration sources, {model}, {width(about)}",
                "calibration images",
                "KL from the float prediction",
                curves,
                log_x=True,
                log_y=True,
            )
        )
    return plots
