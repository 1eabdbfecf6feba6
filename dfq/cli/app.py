"""Commands: each parses its options, calls the public function of the same name and prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import dfq
from dfq.argument_names import flag_names
from dfq.cli.errors import Group
from dfq.cli.interrupts import raise_once
from dfq.cli.options import (
    Activations,
    Attention,
    Backend,
    Batch,
    Bits,
    Cache,
    CachedName,
    Calibration,
    Checkpoint,
    CheckpointOut,
    ClassMap,
    Cold,
    DatasetOut,
    Depth,
    Device,
    Engine,
    Eval,
    ExportFormat,
    ExportOut,
    ExportWeights,
    Float,
    GlobalPool,
    Heads,
    Images,
    ImgSize,
    InChans,
    InputRange,
    Inspected,
    InversionMethod,
    Iterations,
    Json,
    Layers,
    Mean,
    MinAccuracy,
    MinAgreement,
    Model,
    NoEvaluate,
    NumClasses,
    Pattern,
    Precision,
    Preview,
    Quiet,
    RecipeFile,
    Rows,
    Runtimes,
    RuntimeSeconds,
    RuntimeThreads,
    SaveSpeeds,
    Seed,
    Stages,
    Start,
    Std,
    Steps,
    Student,
    StudentOut,
    TestData,
    Threads,
    TotalSeconds,
    TrainingData,
    TrainingImages,
    Weights,
    Width,
    counts,
    floats,
    sides,
)
from dfq.cli.panels import App
from dfq.cli.terminal import print_json, print_text, shown
from dfq.errors import BenchmarkError, BenchmarkInterrupt, GateError, SettingError
from dfq.progress import is_first
from dfq.recipe_files import shipped_recipes, summary
from dfq.results.tables import (
    benchmark_table,
    distill_table,
    entries_table,
    evaluate_table,
    facts_table,
    field_table,
    layers_of,
    layers_table,
    quantize_table,
)

app = App(
    cls=Group,
    name="dfq",
    help="Quantize a pretrained vision transformer to W8A8 or W4A8 without any data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = App(cls=Group, no_args_is_help=True, help="List, verify and remove cached datasets.")
app.add_typer(cache_app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        print_text(f"dfq {dfq.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Quantize a pretrained vision transformer to W8A8 or W4A8 without any data."""


@app.command(epilog="Example: [bold]dfq quantize vit_base --bits 4[/]")
def quantize(
    model: Model,
    bits: Bits = None,
    recipe: RecipeFile = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    global_pool: GlobalPool = None,
    mean: Mean = None,
    std: Std = None,
    input_range: InputRange = None,
    calibration: Calibration = None,
    images: Images = None,
    iterations: Iterations = None,
    stages: Stages = None,
    attention: Attention = None,
    activations: Activations = None,
    out: CheckpointOut = None,
    no_evaluate: NoEvaluate = False,
    eval: Eval = None,
    class_map: ClassMap = None,
    seed: Seed = None,
    threads: Threads = None,
    precision: Precision = None,
    device: Device = "cpu",
    cache: Cache = None,
    min_agreement: MinAgreement = None,
    min_accuracy: MinAccuracy = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a ViT without data and write a checkpoint."""
    try:
        result = dfq.quantize(
            model,
            bits=bits,
            recipe=recipe,
            weights=weights,
            num_classes=num_classes,
            img_size=sides(img_size),
            in_chans=in_chans,
            global_pool=global_pool,
            mean=floats(mean, "--mean"),
            std=floats(std, "--std"),
            input_range=floats(input_range, "--input-range", "0,255"),
            calibration=calibration,
            images=images,
            iterations=iterations,
            stages=stages,
            attention=attention,
            activations=activations,
            out=out,
            evaluate=not no_evaluate,
            eval=eval,
            class_map=class_map,
            seed=seed,
            threads=threads,
            precision=precision,
            device=device,
            cache=cache,
            min_agreement=min_agreement,
            min_accuracy=min_accuracy,
            progress=shown(quiet),
        )
    except GateError as error:
        _show(error.result, json_, quiet, quantize_table)
        raise
    _show(result, json_, quiet, quantize_table)


@app.command(epilog="Example: [bold]dfq invert vit_base --images 64 --out images[/]")
def invert(
    model: Model,
    method: InversionMethod = None,
    images: Images = None,
    iterations: Iterations = None,
    stages: Stages = None,
    out: DatasetOut = None,
    recipe: RecipeFile = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    global_pool: GlobalPool = None,
    mean: Mean = None,
    std: Std = None,
    input_range: InputRange = None,
    seed: Seed = None,
    threads: Threads = None,
    precision: Precision = None,
    device: Device = "cpu",
    cache: Cache = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Invert a ViT into a sparse-image dataset."""
    result = dfq.invert(
        model,
        method=method,
        images=images,
        iterations=iterations,
        stages=stages,
        out=out,
        recipe=recipe,
        threads=threads,
        precision=precision,
        weights=weights,
        num_classes=num_classes,
        img_size=sides(img_size),
        in_chans=in_chans,
        global_pool=global_pool,
        mean=floats(mean, "--mean"),
        std=floats(std, "--std"),
        input_range=floats(input_range, "--input-range", "0,255"),
        seed=seed,
        device=device,
        cache=cache,
        progress=shown(quiet or not is_first()),
    )
    if is_first():
        _show(result, json_, quiet, field_table)


@app.command(epilog="Example: [bold]dfq evaluate demo-w4a8 --data demo --float demo[/]")
def evaluate(
    checkpoint: Checkpoint,
    data: TestData,
    class_map: ClassMap = None,
    float_: Float = None,
    weights: Weights = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    global_pool: GlobalPool = None,
    device: Device = "cpu",
    backend: Backend = None,
    runtime: Engine = "torch",
    min_agreement: MinAgreement = None,
    min_accuracy: MinAccuracy = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint on images: accuracy with labels, agreement with the float model."""
    try:
        result = dfq.evaluate(
            checkpoint,
            data=data,
            class_map=class_map,
            float_model=float_,
            weights=weights,
            img_size=sides(img_size),
            in_chans=in_chans,
            global_pool=global_pool,
            device=device,
            backend=backend,
            runtime=runtime,
            min_agreement=min_agreement,
            min_accuracy=min_accuracy,
            progress=shown(quiet),
        )
    except GateError as error:
        _show(error.result, json_, quiet, evaluate_table)
        raise
    _show(result, json_, quiet, evaluate_table)


@app.command(epilog="Example: [bold]dfq distill demo --depth 3 --eval demo[/]")
def distill(
    teacher: Model,
    student: Student = None,
    depth: Depth = None,
    width: Width = None,
    heads: Heads = None,
    data: TrainingData = None,
    images: TrainingImages = None,
    iterations: Iterations = None,
    stages: Stages = None,
    steps: Steps = None,
    start: Start = None,
    recipe: RecipeFile = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    global_pool: GlobalPool = None,
    mean: Mean = None,
    std: Std = None,
    input_range: InputRange = None,
    out: StudentOut = None,
    eval: Eval = None,
    class_map: ClassMap = None,
    seed: Seed = None,
    threads: Threads = None,
    device: Device = "cpu",
    cache: Cache = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a student ViT on images inverted from its teacher."""
    result = dfq.distill(
        teacher,
        student=student,
        depth=depth,
        width=width,
        heads=heads,
        data=data,
        images=images,
        iterations=iterations,
        stages=stages,
        steps=steps,
        start=start,
        recipe=recipe,
        weights=weights,
        num_classes=num_classes,
        img_size=sides(img_size),
        in_chans=in_chans,
        global_pool=global_pool,
        mean=floats(mean, "--mean"),
        std=floats(std, "--std"),
        input_range=floats(input_range, "--input-range", "0,255"),
        out=out,
        eval=eval,
        class_map=class_map,
        seed=seed,
        threads=threads,
        device=device,
        cache=cache,
        progress=shown(quiet),
    )
    _show(result, json_, quiet, distill_table)


@app.command(epilog="Example: [bold]dfq export demo-w4a8 --out demo.onnx[/]")
def export(
    checkpoint: Checkpoint,
    format: ExportFormat = "onnx",
    out: ExportOut = None,
    weights: ExportWeights = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint as ONNX, for TensorRT too, OpenVINO IR or a torch.export program."""
    export_checkpoint = dfq.export
    raise_once()
    result = export_checkpoint(checkpoint, format=format, out=out, weights=weights)
    _show(result, json_, quiet, field_table)


@app.command(epilog="Example: [bold]dfq benchmark demo-w4a8 --batch 1,16[/]")
def benchmark(
    checkpoint: Checkpoint,
    batch: Batch = "1,16",
    seconds: RuntimeSeconds = 5.0,
    total_seconds: TotalSeconds = None,
    threads: RuntimeThreads = None,
    device: Device = "cpu",
    runtimes: Runtimes = None,
    cold: Cold = False,
    save: SaveSpeeds = False,
    cache: Cache = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a checkpoint's speed with PyTorch, torchao, ONNX Runtime and OpenVINO."""
    try:
        result = dfq.benchmark(
            checkpoint,
            batch=counts(batch, "--batch", "1,16"),
            seconds=seconds,
            total_seconds=total_seconds,
            threads=threads,
            device=device,
            runtimes=None if runtimes is None else runtimes.split(","),
            cold=cold,
            save=save,
            cache=cache,
            progress=shown(quiet),
        )
    except (BenchmarkError, BenchmarkInterrupt) as error:
        _show(error.result, json_, quiet, benchmark_table)
        raise
    _show(result, json_, quiet, benchmark_table)


@app.command(epilog="Example: [bold]dfq inspect demo-w4a8[/]")
def inspect(
    path: Inspected,
    weights: Weights = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    global_pool: GlobalPool = None,
    preview: Preview = None,
    rows: Rows = None,
    layers: Layers = False,
    json_: Json = False,
) -> None:
    """Describe a dataset, a checkpoint or a model; datasets are verified."""
    if rows is not None and preview is None:
        raise SettingError("--rows needs --preview FILE.")
    if layers and preview is not None:
        raise SettingError("--layers takes a checkpoint, --preview a dataset; give one of them.")
    facts = dfq.inspect(
        path,
        weights=weights,
        num_classes=num_classes,
        img_size=sides(img_size),
        in_chans=in_chans,
        global_pool=global_pool,
    )
    if layers:
        _show({"layers": layers_of(facts, path)}, json_, False, layers_table)
        return
    if preview is not None:
        with flag_names(out="--preview"):
            facts["preview"] = str(dfq.preview(path, preview, rows=8 if rows is None else rows))
    _show(facts, json_, False, facts_table)


@app.command(epilog="Example: [bold]dfq models deit[/]")
def models(pattern: Pattern = None, json_: Json = False) -> None:
    """List the names of models, and which of them are not supported."""
    entries = dfq.models(pattern)
    if json_:
        print_json([dataclasses.asdict(e) for e in entries])
        return
    for entry in entries:
        weights = "" if entry.pretrained else "  (no pretrained weights)"
        marks = {True: "", False: f"  [red]refused: {escape(entry.reason or '')}[/]", None: "  ?"}
        line = f"{entry.name}  [dim]{entry.kind}{weights}[/]{marks[entry.supported]}"
        print_text(line, soft_wrap=True)


@app.command(epilog="Example: [bold]dfq recipes[/]")
def recipes(json_: Json = False) -> None:
    """List the recipes that ship with dfq, for --recipe NAME."""
    entries = [
        {"name": name, "summary": summary(path), "path": str(path)}
        for name, path in shipped_recipes().items()
    ]
    if json_:
        print_json(entries)
        return
    for entry in entries:
        print_text(f"{entry['name']}  [dim]{escape(entry['summary'])}[/]", soft_wrap=True)


@app.command(epilog="Example: [bold]dfq doctor[/]")
def doctor(cache: Cache = None, json_: Json = False) -> None:
    """Describe this machine and its problems; exit 1 if there are any."""
    report = dfq.doctor(cache)
    _show(report, json_, False, field_table)
    if report.problems:
        raise typer.Exit(1)


@cache_app.command("list", epilog="Example: [bold]dfq cache list[/]")
def cache_list(cache: Cache = None, json_: Json = False) -> None:
    """List the cached datasets, and engines' files by checkpoint."""
    _show_entries(dfq.list_cache(cache), json_)


@cache_app.command("verify", epilog="Example: [bold]dfq cache verify[/]")
def cache_verify(cache: Cache = None, json_: Json = False) -> None:
    """Verify the checksums of all cached files; exit 1 if one is damaged."""
    entries = dfq.verify_cache(cache)
    _show_entries(entries, json_)
    if any(e.problem and e.problem != "unfinished" for e in entries):
        raise typer.Exit(1)


@cache_app.command("remove", epilog="Example: [bold]dfq cache remove all[/]")
def cache_remove(
    name: CachedName,
    cache: Cache = None,
    json_: Json = False,
) -> None:
    """Remove cached datasets and engines' files."""
    _show_entries(dfq.remove_cached(name, cache), json_, title="Removed")


def _show(
    result: Any, as_json: bool, quiet: bool, table: Callable[[dict[str, Any]], Table]
) -> None:
    values = result if isinstance(result, dict) else dataclasses.asdict(result)
    if as_json:
        print_json(values)
    elif not quiet:
        print_text(table(values))


def _show_entries(entries: list[Any], as_json: bool, title: str | None = None) -> None:
    if as_json:
        print_json([dataclasses.asdict(e) for e in entries])
        return
    if not entries:
        print_text("The cache is empty.")
        return
    print_text(entries_table(entries, title))
