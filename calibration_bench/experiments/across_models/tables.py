"""Tables and plots of ``across-models``."""

from __future__ import annotations

from calibration_bench.core.registry import Curve, Plot, Row, Table
from calibration_bench.core.tables import groups

SETTING = ("iterations", "batch", "precision", "threads", "device")

NOTE = (
    "Models with random weights (the demo has its own); speed does not depend on them. *Faster*: "
    "seconds an image of DMI over those of the method, measured, and, in brackets, patch updates "
    "of DMI over its own: attention's quadratic part makes the measured ratio larger, what does "
    "not depend on the number of patches makes it smaller. *Spread*: how quiet the machine was."
)


def model_tables(rows: list[Row]) -> list[Table]:
    """Return tables with a row for each model and a column for each method."""
    tables: list[Table] = []
    for values, same in groups(rows, *SETTING).items():
        iterations, batch, precision, threads, device = values
        methods = list(dict.fromkeys(row["method"] for row in same))
        columns = {
            "model": "model",
            "millions": "parameters, M",
            "patches": "patches",
            "shape": "depth x width",
            "pool": "pooled",
            "importance": "importance",
            **{f"{m}_seconds": f"{m}, s / image" for m in methods},
            **{f"{m}_faster": f"{m} faster than dmi" for m in methods if m != "dmi"},
            "spread": "spread",
        }
        title = (
            f"T = {iterations}, {batch} trajectories at once, {precision}, {threads} threads, "
            f"{device}"
        )
        models = [_row(part) for part in groups(same, "model").values()]
        tables.append(Table(title, columns, models, NOTE))
    return tables


def _row(rows: list[Row]) -> Row:
    first, by = rows[0], {row["method"]: row for row in rows}
    columns = {
        **{name: first[name] for name in ("model", "patches", "pool", "importance")},
        "millions": first["parameters"] / 1e6,
        "shape": f"{first['depth']} x {first['width']}",
        "spread": max(row["spread"] for row in rows),
    }
    for method, row in by.items():
        columns[f"{method}_seconds"] = row["seconds_per_image"]
        if "dmi" in by and method != "dmi":
            time, updates = (
                by["dmi"][name] / row[name] for name in ("seconds_per_image", "updates_per_image")
            )
            columns[f"{method}_faster"] = f"{time:.1f}x ({updates:.1f}x)"
    return columns


def model_plots(rows: list[Row]) -> list[Plot]:
    """Return plots of seconds per image over the number of parameters."""
    plots: list[Plot] = []
    for number, same in enumerate(groups(rows, *SETTING).values(), 1):
        curves = []
        for (method,), part in groups(same, "method").items():
            part = sorted(part, key=lambda row: int(row["parameters"]))
            seconds = [float(row["seconds_per_image"]) for row in part]
            curves.append(Curve(str(method), [row["parameters"] / 1e6 for row in part], seconds))
        plots.append(
            Plot(
                f"models-{number}",
                f"Inversion, T = {same[0]['iterations']}",
                "parameters, millions",
                "seconds per image",
                curves,
                log_x=True,
                log_y=True,
                lines=False,
            )
        )
    return plots
