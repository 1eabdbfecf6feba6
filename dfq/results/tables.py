"""Tables of results, as the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dfq.errors import UsageError
from dfq.text import duration, escape

MADE = {
    "inverted": "inverted images of another seed",
    "fractal noise": "images of fractal noise",
}
"""Descriptions of images made by dfq, by ``AgreementOn.data``."""

MAX_DECIBELS = 1000
"""Largest SQNR in decibels; a report with larger values was not written by dfq."""

SQNR_FIELDS = ("weights", "activations", "both")
"""Names of a layer's three SQNRs."""

UNMEASURED = ("agreement", "not measured")
"""Row of a checkpoint that was not compared with the float model."""

HIGHLIGHTED = 3
"""Number of layers with the lowest SQNR that are shown in red."""


def _two_columns() -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def entries_table(entries: list[Any], title: str | None = None) -> Table:
    """Table of what the cache holds, one entry per row."""
    table = Table(title=title)
    for column in ("name", "model or checkpoint", "holds", "size", "state"):
        table.add_column(column, overflow="fold")
    for e in entries:
        whose = e.model if e.kind == "dataset" else e.checkpoint or e.model
        holds = f"{e.images} images, {e.method}" if e.kind == "dataset" else ", ".join(e.contents)
        named = (escape(text) for text in (e.name, whose, holds))
        table.add_row(*named, _size(e.bytes), escape(e.problem or "whole"))
    return table


def field_table(values: dict[str, Any]) -> Table:
    """Table of fields and their values; empty fields are left out."""
    table = _two_columns()
    for key, value in values.items():
        if not _is_empty(value):
            title = "time" if key == "seconds" else key.replace("_", " ")
            table.add_row(escape(title), _text(key, value))
    return table


def _is_empty(value: Any) -> bool:
    """Whether a field holds nothing that a table could show; 0 and False are something."""
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def layers_of(facts: dict[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """Return the measured layers of a checkpoint's report.

    Raises:
        UsageError: the report has none.
    """
    report = facts.get("report")
    layers = report.get("layers") if isinstance(report, dict) else None
    if not isinstance(layers, list) or not layers or not all(map(_is_layer, layers)):
        raise UsageError(
            f"{str(path)!r} has no measured layers, which take a checkpoint with the "
            "report.json that `dfq quantize` wrote."
        )
    return layers


def _is_layer(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(
            type(row.get(key)) in (int, float) and abs(row[key]) <= MAX_DECIBELS
            for key in SQNR_FIELDS
        )
        and isinstance(row.get("name"), str)
    )


def layers_table(values: dict[str, Any]) -> Table:
    """Table of SQNRs in decibels, with the worst layers marked."""
    table = Table(title="signal to quantization noise, dB")
    table.add_column("layer")
    for column in SQNR_FIELDS:
        table.add_column(column, justify="right")
    worst = sorted(row["both"] for row in values["layers"])[:HIGHLIGHTED]
    for row in values["layers"]:
        style = "bold red" if row["both"] in worst else None
        table.add_row(escape(row["name"]), *(f"{row[k]:.1f}" for k in SQNR_FIELDS), style=style)
    return table


def facts_table(values: dict[str, Any]) -> Table:
    """Table of a dataset or checkpoint, with results and gates of its report."""
    table = field_table({k: v for k, v in values.items() if k != "report"})
    try:
        report = values["report"]
        measured = agreement_rows(report) or ([UNMEASURED] if "agreement_on" in report else [])
        rows = [*measured, *verdict_rows(report)]
    except (LookupError, TypeError, ValueError, AttributeError):
        rows = []  # none, or one that other programs wrote
    for row in rows:
        table.add_row(*row)
    return table


def _text(key: str, value: Any) -> str:
    if key == "kernels":
        return _kernels(value)
    if isinstance(value, dict):
        inner = {
            k: _text("bytes" if key == "bytes" else k, v)
            for k, v in value.items()
            if not _is_empty(v)
        }
        lists = {k for k in inner if isinstance(value[k], list | tuple)}
        return ", ".join(f"{escape(k)} {f'({v})' if k in lists else v}" for k, v in inner.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(key, v) for v in value)
    if key == "bytes" and isinstance(value, int):
        return _size(value)
    if key == "seconds" and isinstance(value, int | float):
        return duration(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def _kernels(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each entry of kernels, then the reasons against preferred backends."""
    devices = {row["device"] for row in rows}
    lines, reasons = [], dict[str, None]()
    for row in rows:
        where = f"{row['device']}: " if len(devices) > 1 else ""
        instead = "".join(f", not {name}" for name in row["refused"])
        kernel = f"{row['backend']} in {row['operands']}{instead}"
        lines.append(f"{where}{row['layers']}{_weights(row)}: {kernel}")
        reasons |= dict.fromkeys(f"{where}{name}: {why}" for name, why in row["refused"].items())
    return escape("\n".join([*lines, *reasons]))


def _weights(row: dict[str, Any]) -> str:
    """How many layers of a model an entry of kernels has, and their weights."""
    if row["count"] is None:
        return ""
    bits = row["bits"]
    weights = "" if bits is None else f", int{bits} weights up to {row['max_weight']}"
    return f" ({row['count']}){weights}"


def quantize_table(r: dict[str, Any]) -> Table:
    """Table of a :class:`~dfq.results.values.QuantizeResult`."""
    table = _two_columns()
    source, size = r["calibration"], r["bytes"]
    origin = "from the cache" if source["cached"] else "made now"
    if source["cached"] is None:
        origin = escape(source["path"])
    table.add_row("model", f"{escape(r['model'])}, {r['scheme']}, attention {r['attention']}")
    table.add_row("calibration", f"{source['images']} images, {escape(source['method'])}, {origin}")
    ratio = size["float"] / max(1, size["quantized"])
    table.add_row(
        "size", f"{_size(size['float'])} -> {_size(size['quantized'])} ({ratio:.1f} times smaller)"
    )
    agreement = agreement_rows(r) or [UNMEASURED]
    for row in (*accuracy_rows(r), *agreement, *verdict_rows(r)):
        table.add_row(*row)
    stages = ", ".join(f"{k} {duration(v)}" for k, v in r["seconds"].items())
    table.add_row("time", stages)
    table.add_row("checkpoint", escape(r["checkpoint"]))
    return table


def evaluate_table(r: dict[str, Any]) -> Table:
    """Table of an :class:`~dfq.results.values.EvaluateResult`."""
    table = _two_columns()
    table.add_row("checkpoint", escape(r["checkpoint"]))
    table.add_row("model", f"{escape(r['model'])}, {r['scheme']}")
    table.add_row("data", f"{r['images']} images of {escape(r['data'])}")
    for row in (*accuracy_rows(r), *agreement_rows(r), *verdict_rows(r)):
        table.add_row(*row)
    speed = f"{r['images_per_second']:.1f} images/s on {r['backend']}"
    table.add_row("time", f"{duration(r['seconds'])}, {speed}")
    return table


def accuracy_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of both models' accuracies, and of the order of classes."""
    rows = []
    for name, key in (("top-1", "accuracy"), ("top-5", "accuracy_top5")):
        accuracy = r[key]
        if accuracy:
            float_ = "" if accuracy["float"] is None else f"float {accuracy['float']:.2%}, "
            counts = f"{accuracy['correct']} of {accuracy['images']}"
            rows.append(
                (
                    name,
                    f"{float_}quantized {accuracy['quantized']:.2%}"
                    f"{_interval(accuracy['interval'], counts)}",
                )
            )
    return [*rows, ("classes", _class_order(r["class_order"]))] if rows else []


_ORDERS = {
    "imagenet synsets": "folders are ImageNet synsets",
    "number": "folders in the order of their numbers",
    "name": "folders in the order of their names",
    "class map": "folders as the class map says",
    "y": "y of the array",
}


def _class_order(order: str | None) -> str:
    return _ORDERS.get(order or "", "not labeled")


_METRICS = {
    "top1": "agreement",
    "threshold": "agreement",
    "cosine": "cosine of features",
}


def agreement_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of agreement, for each kind of images."""
    measured = [r.get("agreement_on"), r.get("agreement_outside")]
    return [row for on in measured if on for row in _agreement_rows(on)]


def _agreement_rows(on: dict[str, Any]) -> list[tuple[str, str]]:
    where = escape(MADE.get(on["data"], f"images of {on['data']}"))
    value = "not measured" if on["agreement"] is None else f"{on['agreement']:.2%}"
    counts = "" if on["agreeing"] is None else f"{on['agreeing']:d} of {on['images']:d}"
    side = "" if on["threshold"] is None else f", same side of {on['threshold']:.4g}"
    rows = [
        (
            _METRICS[on["metric"]],
            f"{value} on {on['images']:d} {where}{_interval(on['interval'], counts)}{side}",
        )
    ]
    if on["metric"] != "top1" and on["error_over_spread"] is not None:
        rows.append(("error over spread", f"{on['error_over_spread']:.4g}"))
    return rows


def _interval(interval: list[float] | None, counts: str = "") -> str:
    if interval is None:
        return ""
    low, high = interval
    return f" ({counts}{counts and '; '}95 %: {low:.2%} to {high:.2%})"


def verdict_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of gates and warnings."""
    rows = []
    for check in r.get("gate", ()):
        passed = "kept" if check["passed"] else "[bold red]not kept[/]"
        rows.append(("gate", f"{escape(check['what'])} of at least {check['bound']:g}: {passed}"))
    return [*rows, *(("warning", escape(text)) for text in r.get("warnings", ()))]


def distill_table(r: dict[str, Any]) -> Table:
    """Table of a :class:`~dfq.results.values.DistillResult`."""
    table = _two_columns()
    table.add_row("teacher", escape(r["teacher"]))
    table.add_row("student", f"{escape(r['student'])}, {r['parameters'] / 1e6:.2f} M parameters")
    begun = "blocks of the teacher's" if r["start"] == "teacher" else "random weights"
    table.add_row("began with", begun)
    table.add_row("images", f"{r['data']['images']}, {escape(r['data']['method'])}")
    table.add_row("loss", f"{r['losses'][0]:.3g} -> {r['losses'][-1]:.3g}")
    if r["accuracy"]:
        accuracy = r["accuracy"]
        interval = _interval(accuracy["interval"])
        table.add_row(
            "top-1",
            f"teacher {accuracy['teacher']:.2%}, student {accuracy['student']:.2%}{interval}",
        )
        table.add_row("classes", _class_order(r["class_order"]))
    for row in (*agreement_rows(r), *verdict_rows(r)):
        table.add_row(*row)
    spent = f"{duration(r['seconds'])}, of it training {duration(r['training_seconds'])}"
    table.add_row("time", spent)
    table.add_row("written to", escape(r["path"]))
    return table


def benchmark_table(r: dict[str, Any]) -> Table:
    """Table of speeds, also relative to torch-fp32 at the same batch size."""
    threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
    where = threads if r["device"] == "cpu" else r["device"]
    table = Table(
        title=escape(f"{r['model']}, {r['scheme']}, attention {r['attention']}, {where}"),
        caption=escape("\n".join(_benchmark_notes(r))),
        caption_justify="left",
    )
    table.add_column("runtime", no_wrap=True)
    for column in ("batch", "images/s", "median ms", "p95 ms", "of fp32"):
        table.add_column(column, justify="right")
    base = {x["batch"]: x["images_per_second"] for x in r["rows"] if x["runtime"] == "torch-fp32"}
    for row in r["rows"]:
        speed, batch = row["images_per_second"], row["batch"]
        ratio = f"{speed / base[batch]:.2f}" if batch in base else ""
        times = (f"{row['median_ms']:.2f}", f"{row['p95_ms']:.2f}")
        name = row["runtime"] if row["warm"] else f"{row['runtime']} *"
        table.add_row(name, str(batch), f"{speed:.1f}", *times, ratio)
    return table


def _benchmark_notes(r: dict[str, Any]) -> list[str]:
    notes = [f"Stopped early: {r['stopped']}"] if r["stopped"] else []
    if not all(row["warm"] for row in r["rows"]):
        notes.append(f"* its first call alone, as another did not fit into {r['seconds']:g} s")
    if r["isa"]:
        notes.append("ISA: " + ", ".join(f"{library} {name}" for library, name in r["isa"].items()))
    for batch, runtime in (r["saved"] or {}).items():
        notes.append(f"dfq.load runs on {runtime} from now on (measured at batch {batch})")
    for a in r["absent"]:
        at = "" if a["batch"] is None else f" at batch {a['batch']}"
        notes.append(f"{a['runtime']} absent{at}: {a['reason']}")
    return notes + [
        f"{c['runtime']} from a cold process to its first prediction: "
        f"{duration(c['seconds'], 2)}, at most {_size(c['peak_bytes'])}"
        for c in r["cold"] or ()
    ]


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"
