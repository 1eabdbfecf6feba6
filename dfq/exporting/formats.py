"""``dfq.export``: a checkpoint as a file of another format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dfq import checkpoint as checkpoints
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.errors import OutputError, SettingError
from dfq.exporting import program
from dfq.exporting.facts import facts, layer_bits
from dfq.exporting.forms import integer_layers
from dfq.extras import require
from dfq.files import explain
from dfq.ownership import FileFormat, check_file_place, move_files, write_file
from dfq.quantization.model import QuantizedViT
from dfq.quantization.scheme import Scheme, layers
from dfq.results.values import ExportResult
from dfq.runtime import onednn

Format = Literal["onnx", "openvino", "torch", "tensorrt"]
FORMATS: tuple[str, ...] = get_args(Format)
WEIGHTS = ("int8", "int4")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "tensorrt": ".onnx"}
RUNTIMES = {"tensorrt": "TensorRT"}
"""Names of the runtimes whose formats take some schemes only."""


@dataclass(frozen=True)
class _Job:
    """Arguments of a format's writer."""

    model: QuantizedViT
    facts: dict[str, str]
    weights: Any
    path: Path


@checked
def export(
    checkpoint: str | Path,
    *,
    format: str = "onnx",
    out: str | Path | None = None,
    weights: str | None = None,
) -> ExportResult:
    """Write a checkpoint as a file that another runtime executes.

    The file takes what the module of :func:`dfq.load` takes: normalized images float32
    ``[N, C, H, W]``, any N; it gives the logits.  Files that this function wrote are
    replaced, others are not.

    Args:
        checkpoint: a checkpoint directory.
        format: ``onnx`` (QuantizeLinear and DequantizeLinear around every product),
            ``openvino`` (an .xml and a .bin of the same), ``torch`` (a ``torch.export``
            program of the reference arithmetic) or ``tensorrt`` (ONNX by TensorRT's rules,
            of checkpoints with symmetric activations).
        out: the file; by default the checkpoint's name with the format's suffix, in the
            working directory.
        weights: of layers of 4 bits in ONNX: ``int8``, widened without loss, or ``int4``.

    Raises:
        ExtraError: the format's packages are not installed.
        DfqError: one of its other subclasses says what is wrong.
    """
    if format not in FORMATS:
        raise SettingError(f"{option('format')} is {format!r}; it is one of {', '.join(FORMATS)}.")
    info = checkpoints.read_info(checkpoint)
    settings = info.recipe.quantization
    _check_scheme(format, Scheme(settings), layers(info.arch))
    chosen = _weights(weights, format, layer_bits(info))
    suffix = SUFFIXES[format]
    path = Path(f"{Path(checkpoint).resolve().name}{suffix}") if out is None else Path(out)
    if path.suffix != suffix:
        raise OutputError(f"out is {str(path)!r}; a file of format {format!r} ends in {suffix}.")
    file_format = _file_format(format)
    check_file_place(path, file_format)
    model = checkpoints.load(checkpoint)
    target = {"target": format} if format in RUNTIMES else {}
    job = _Job(model, {**facts(info, chosen), **target}, chosen, path)
    products, integer_products = _WRITERS[format](job)
    return ExportResult(
        checkpoint=str(checkpoint),
        model=info.model,
        scheme=Scheme(settings).name,
        attention=settings.attention,
        format=format,
        weights=chosen,
        path=str(path),
        bytes=sum(file.stat().st_size for file in file_format.members(path)),
        products=products,
        integer_products=integer_products,
        warnings=_saturation_warnings(model) if format in ("onnx", "openvino") else [],
    )


def _check_scheme(format: str, scheme: Scheme, names: list[str]) -> None:
    """Raise :class:`SettingError` if a format's runtime cannot multiply the scheme's integers.

    ``names`` are the model's linear layers.
    """
    if format not in RUNTIMES:
        return
    runtime = RUNTIMES[format]
    if format == "tensorrt" and not scheme.symmetric_activations:
        raise SettingError(
            f"{runtime} takes inputs of layers as int8 with zero point 0 alone; those of this "
            "checkpoint have zero points. Quantize again with "
            f"{option('activations', 'symmetric')}."
        )
    if scheme.integer_attention:
        raise SettingError(
            f"{runtime} has no attention on 8-bit integers whose softmax has a scale a row. "
            f"Quantize again with {option('attention', 'float')}."
        )
    narrow = [name for name in names if scheme.for_layer(name).input.bits < 8]
    if narrow:
        raise SettingError(
            f"{runtime} knows 8-bit inputs of layers alone; that of {narrow[0]!r} has "
            f"{scheme.for_layer(narrow[0]).input.bits} bits. Quantize again with input_bits = 8."
        )


def _saturation_warnings(model: QuantizedViT) -> list[str]:
    """Return a warning if weights saturate on x86 processors without VNNI.

    There, ONNX Runtime, OpenVINO and oneDNN add pairs of 8-bit products in 16 bits.
    """
    largest = model.max_weight()
    if largest <= onednn.MAX_WEIGHT_WITHOUT_VNNI:
        return []
    return [
        f"Weights reach {largest}, which saturate in ONNX Runtime and OpenVINO on x86 processors "
        "without VNNI: logits are wrong there. Quantize again with reduce_range = true (the "
        "default)."
    ]


def _weights(weights: str | None, format: str, bits: Set[int]) -> str:
    """Return the type of the narrowest weights in the file; ``bits`` are those of the layers."""
    if weights is None:
        return f"int{min(bits)}" if format == "torch" else "int8"
    if weights not in WEIGHTS:
        raise SettingError(
            f"{option('weights')} is {weights!r}; it is one of {', '.join(WEIGHTS)}."
        )
    if format != "onnx":
        raise SettingError(
            f"{option('weights')} is a choice of {option('format', 'onnx')} alone; leave it out."
        )
    if weights == "int4" and 4 not in bits:
        bit_widths = ", ".join(map(str, sorted(bits)))
        raise SettingError(
            f"{option('weights', 'int4')} needs layers of 4 bits; this checkpoint has {bit_widths}."
        )
    return weights


def _file_format(format: str) -> FileFormat:
    """Return what tells the files of a format that dfq wrote from others."""
    what = f"a file that dfq wrote as {format!r}"
    if format == "torch":
        return FileFormat(what, program.is_export)
    _require_onnx(format)
    from dfq.exporting import onnx_model, openvino_model

    if format == "openvino":
        return FileFormat(what, openvino_model.is_export, (openvino_model.BESIDE,))
    return FileFormat(what, onnx_model.is_export)


def _require_onnx(format: str) -> None:
    require("onnx", "openvino" if format == "openvino" else "onnx")


Counts = tuple[int | None, int | None]
"""Number of quantized products, and how many of them run on integers; None if unknown."""


def _onnx(job: _Job, format: str = "onnx") -> tuple[bytes, list[str]]:
    _require_onnx(format)
    from dfq.exporting.onnx_model import onnx_bytes
    from dfq.exporting.products import QuantizedProducts, integer_products
    from dfq.exporting.tensorrt import TensorRTProducts
    from dfq.exporting.weights import SMALLEST_BLOCK, four_bit_block

    blocks = map(four_bit_block, integer_layers(job.model).values())
    if job.weights == "int4" and not any(blocks):
        raise SettingError(
            f"{option('weights', 'int4')} needs a layer of 4 bits whose inputs are blocks of "
            f"{SMALLEST_BLOCK} or more with one scale; this checkpoint has none. Leave it out, or "
            "quantize with group = 32."
        )
    write = TensorRTProducts if format == "tensorrt" else QuantizedProducts
    products = write(job.model, job.weights)
    return onnx_bytes(job.model, products, job.facts), integer_products(job.model)


def _write_onnx(job: _Job) -> Counts:
    content, products = _onnx(job)
    write_file(job.path, content, _file_format("onnx"))
    return len(products), None


def _write_tensorrt(job: _Job) -> Counts:
    content, products = _onnx(job, "tensorrt")
    write_file(job.path, content, _file_format("tensorrt"))
    return len(products), None


def _write_openvino(job: _Job) -> Counts:
    openvino = require("openvino", "openvino")
    content, products = _onnx(job, "openvino")
    from dfq.exporting.openvino_model import compile_model, integers_in, save_ir

    try:
        with tempfile.TemporaryDirectory(prefix=".dfq-", dir=job.path.parent) as directory:
            temporary = Path(directory) / job.path.name
            save_ir(content, job.facts, temporary)
            count = len(integers_in(compile_model(openvino, temporary), products))
            move_files(temporary, job.path, _file_format("openvino"))
    except OSError as error:
        raise explain(error, job.path) from error
    except RuntimeError as error:  # raised by OpenVINO if it cannot write a file
        if "basic_ios" not in str(error):
            raise
        raise OutputError(f"OpenVINO cannot write {str(job.path)!r}: {error}") from error
    return len(products), count


def _write_torch(job: _Job) -> Counts:
    write_file(job.path, program.program_bytes(job.model, job.facts), _file_format("torch"))
    return None, None


_WRITERS: dict[str, Callable[[_Job], Counts]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch": _write_torch,
    "tensorrt": _write_tensorrt,
}
