"""Plots of stored results as PNG; the only module that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calibration_bench.core.registry import Curve, Plot
from dfq.errors import UsageError
from dfq.files import make_directory, safe_name, write_bytes
from dfq.installation import install_command

MARKERS = "osD^vPX*<>hd"


def draw_plots(plots: Iterable[Plot], directory: Path) -> list[Path]:
    """Write each plot to a PNG file of its name; repeated names get a number.

    Raises:
        UsageError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    paths: list[Path] = []
    for plot in plots:
        name = safe_name(plot.name)
        same = sum(path.stem.rsplit("--", 1)[0] == name for path in paths)
        path = directory / (f"{name}--{same + 1}.png" if same else f"{name}.png")
        make_directory(directory)
        write_bytes(path, _png(plot))
        paths.append(path)
    return paths


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"Plots need matplotlib: {install_command('report')}") from error
    return Figure(figsize=(8, 5), dpi=120, layout="constrained")


def _png(plot: Plot) -> bytes:
    figure = _figure()
    axes = figure.add_subplot()
    for number, curve in enumerate(plot.curves):
        _draw(axes, curve, number, lines=plot.lines)
    axes.set_title(plot.title)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.set_xscale("log" if plot.log_x else "linear")
    axes.set_yscale("log" if plot.log_y else "linear")
    if plot.log_x:
        _plain_ticks(axes, plot)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, curve: Curve, number: int, *, lines: bool) -> None:
    """Draw a curve: a line or points, with error bars if given; long lines without markers."""
    style = {
        "label": curve.name,
        "color": f"C{number % 10}",
        "linestyle": ("-", "--")[number // 10 % 2] if lines else "none",
        "marker": MARKERS[number % len(MARKERS)] if len(curve.x) <= 24 or not lines else None,
        "markersize": 5,
        "linewidth": 1.5,
    }
    if curve.error is not None and any(curve.error):
        axes.errorbar(curve.x, curve.y, yerr=curve.error, capsize=2, elinewidth=0.8, **style)
    else:
        axes.plot(curve.x, curve.y, **style)


def _plain_ticks(axes: Any, plot: Plot) -> None:
    """Label a logarithmic axis with the values themselves if they are few whole numbers."""
    values = sorted({x for curve in plot.curves for x in curve.x})
    if len(values) <= 8 and all(value == round(value) for value in values):
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
