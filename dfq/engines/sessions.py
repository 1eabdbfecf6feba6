"""Engines: runtimes of other projects that execute an exported checkpoint on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dfq.argument_names import option
from dfq.device import cpu_has, int8_is_exact, multiplies_bfloat16
from dfq.errors import ExtraError, SettingError, nearest
from dfq.extras import installed, require
from dfq.installation import install_command
from dfq.runtime.onednn import MAX_WEIGHT_WITHOUT_VNNI

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Function of an open model: normalized images ``[N, C, H, W]``, N >= 1, to logits."""


@dataclass(frozen=True)
class ModelFacts:
    """What an engine is told about a model.

    ``max_weight``: largest magnitude of its integers.  ``integer_attention``: whether attention has
    8-bit products.  ``bfloat16``: whether floating-point operations may run in bfloat16 where it is
    native, as those of attention do in PyTorch.
    """

    max_weight: int
    integer_attention: bool
    bfloat16: bool = False


class Open(Protocol):
    """Function that opens a model's files in ``directory`` with a number of threads."""

    def __call__(self, directory: Path, threads: int, facts: ModelFacts) -> Predict: ...


@dataclass(frozen=True)
class Engine:
    """A runtime below :func:`dfq.load`.

    ``package``: its module and distribution, installed by ``extra`` together with ``onnx``, which
    writes its files.  ``format``: of :func:`dfq.export`.  ``files``: their names, the one to export
    first.  ``full_range``: whether weights of the full range are exact without VNNI.
    ``bfloat16``: whether it can compute in bfloat16.
    """

    name: str
    package: str
    extra: str
    format: str
    files: tuple[str, ...]
    full_range: bool
    bfloat16: bool
    open: Open

    @property
    def version(self) -> str | None:
        """Installed version, None if the package is missing."""
        if not installed(self.package):
            return None
        with suppress(metadata.PackageNotFoundError):  # the module of another distribution
            return metadata.version(self.package)
        return str(getattr(require(self.package, self.extra), "__version__", "unknown"))

    def require(self) -> str:
        """Return the installed version.

        Raises:
            ExtraError: the engine is not installed.
        """
        version = self.version
        if version is None:
            raise ExtraError(
                f"runtime {self.name!r} needs the package {self.package!r}, which is not "
                f"installed. Install it with: {install_command(self.extra)}"
            )
        return version

    def unsupported_reason(self, facts: ModelFacts) -> str | None:
        """Return why products would saturate on this processor, or None if they are exact.

        Without VNNI, x86 processors add pairs of 8-bit products in 16 bits.
        """
        if not _adds_in_16_bits():
            return None
        if facts.integer_attention:
            return (
                "the 8-bit products of attention saturate on this processor, which has no VNNI. "
                "Use runtime 'torch', or quantize with attention = 'float'."
            )
        if facts.max_weight > MAX_WEIGHT_WITHOUT_VNNI and not self.full_range:
            return (
                f"weights reach {facts.max_weight} and saturate on this processor, which has no "
                "VNNI. Use runtime 'torch', or quantize with reduce_range = true (the default)."
            )
        return None


def _adds_in_16_bits() -> bool:
    return cpu_has("avx2") and not int8_is_exact(torch.device("cpu"))


def _open_onnxruntime(directory: Path, threads: int, facts: ModelFacts) -> Predict:
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if _adds_in_16_bits() and facts.max_weight > MAX_WEIGHT_WITHOUT_VNNI:
        options.add_session_config_entry("session.x64quantprecision", "1")
    content = (directory / "model.onnx").read_bytes()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images})[0])


def _open_openvino(directory: Path, threads: int, facts: ModelFacts) -> Predict:
    openvino = require("openvino", "openvino")
    bfloat16 = facts.bfloat16 and multiplies_bfloat16(torch.device("cpu"))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = openvino.Core().compile_model(str(directory / "model.xml"), "CPU", options)
    thread = threading.local()  # a request serves one thread at a time

    def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
        if not hasattr(thread, "request"):
            thread.request = compiled.create_infer_request()
        results: Any = thread.request.infer([images], share_inputs=True)
        return np.array(results[0])

    return predict


OPENVINO = Engine(
    name="openvino",
    package="openvino",
    extra="openvino",
    format="openvino",
    files=("model.xml", "model.bin"),
    full_range=False,
    bfloat16=True,
    open=_open_openvino,
)
ONNXRUNTIME = Engine(
    name="onnxruntime",
    package="onnxruntime",
    extra="onnx",
    format="onnx",
    files=("model.onnx",),
    full_range=True,
    bfloat16=False,
    open=_open_onnxruntime,
)
ENGINES = {engine.name: engine for engine in (OPENVINO, ONNXRUNTIME)}
"""Engines by name."""

TORCH, AUTO = "torch", "auto"
RUNTIMES = (AUTO, TORCH, *ENGINES)
"""Values of ``runtime`` of :func:`dfq.load`."""


def check_runtime(runtime: str) -> None:
    """Raise :class:`SettingError` unless it is a value of ``runtime``."""
    if runtime not in RUNTIMES:
        raise SettingError(
            f"{option('runtime')} is {runtime!r}; it is one of {', '.join(RUNTIMES)}."
            f"{nearest(runtime, RUNTIMES)}"
        )


def installed_engines() -> dict[str, str]:
    """Return the versions of the engines that are installed, by name."""
    versions = {name: engine.version for name, engine in ENGINES.items()}
    return {name: version for name, version in versions.items() if version is not None}
