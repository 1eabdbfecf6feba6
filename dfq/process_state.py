"""Isolation from global settings of the process, such as default dtype or warning filters."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any


@contextmanager
def fresh_state() -> Iterator[None]:
    """Run the block with the default global settings of a new process, then restore the caller's.

    Every public function runs inside; nested calls have no effect.  Reset are torch's default dtype
    and device, gradient and inference mode, autocast, torch function modes, anomaly detection, the
    kernels and precision of float32 products, and numpy's handling of floating-point errors.
    Warnings are shown instead of raised.  Deterministic algorithms stay enabled, but only warn
    where there is none.  Global random states are restored.

    Settings of the whole process change for other threads too, until the last thread has left.
    """
    if getattr(_thread, "inside", None) is not None:
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


@contextmanager
def callers_state() -> Iterator[None]:
    """Restore the caller's settings inside :func:`fresh_state`, to run code of the caller."""
    if getattr(_thread, "inside", None) is None:
        yield
        return
    _leave()
    try:
        yield
    finally:
        _enter()


_thread = threading.local()


def _enter() -> None:
    with ExitStack() as stack:
        _process.enter()
        stack.callback(_process.leave)
        _enter_thread(stack)
        _thread.inside = stack.pop_all()


def _leave() -> None:
    stack, _thread.inside = _thread.inside, None
    stack.close()


@dataclass(frozen=True)
class _Setting:
    """Global setting; ``wanted`` maps the caller's value to the one that dfq needs."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    wanted: Callable[[Any], Any]


class _Process:
    """Global settings, changed by the first thread that enters and restored by the last to
    leave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[_Setting, Any] = {}
        self._random: list[Callable[[], Any]] = []

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._random = _random_states()
            for setting in _settings():
                now = setting.read()
                wanted = setting.wanted(now)
                if not self._inside or wanted != now:
                    self._before[setting] = now
                if wanted != now:
                    setting.write(wanted)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            for setting, value in self._before.items():
                if setting.read() != value:
                    setting.write(value)
            for restore in self._random:
                restore()
            self._before, self._random = {}, []


_process = _Process()


def _settings() -> tuple[_Setting, ...]:
    return (_WARNINGS, *(_torch_settings() if "torch" in sys.modules else ()))


def _set_filters(filters: Any) -> None:
    warnings.filters = filters
    with warnings.catch_warnings():  # makes Python forget which warnings it has shown
        pass


_WARNINGS = _Setting(
    read=lambda: warnings.filters,
    write=_set_filters,
    wanted=lambda now: [("default" if f[0] == "error" else f[0], *f[1:]) for f in now],
)


@cache
def _torch_settings() -> tuple[_Setting, ...]:
    import torch

    cuda: Any = torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn

    def always(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> _Setting:
        return _Setting(read, write, lambda _: value)

    return (
        always(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        always(
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda modes: torch.autograd.set_detect_anomaly(*modes),
            (False, True),
        ),
        _Setting(
            torch.get_deterministic_debug_mode,
            torch.set_deterministic_debug_mode,
            lambda mode: min(mode, 1),  # 2 raises where 1 warns
        ),
        always(lambda: mkldnn.enabled, partial(setattr, mkldnn, "enabled"), True),
        _product_precision(mkldnn.matmul),
        _product_precision(cuda.matmul),
        always(cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        always(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
        always(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
        always(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
    )


def _product_precision(of: Any) -> _Setting:
    """Return the setting of the precision of float32 products on CPUs or GPUs."""

    def write(precision: str) -> None:
        of.fp32_precision = "none"
        if of.fp32_precision != precision:
            of.fp32_precision = precision

    return _Setting(lambda: of.fp32_precision, write, lambda now: now if now == "none" else "ieee")


def _random_states() -> list[Callable[[], Any]]:
    """Return functions that restore the global random states of all loaded libraries."""

    def restoring(read: Callable[[], Any], write: Callable[[Any], Any]) -> Callable[[], Any]:
        state = read()
        return lambda: write(state)

    restorers = [restoring(random.getstate, random.setstate)]
    numpy, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy is not None:
        restorers.append(restoring(numpy.get_state, numpy.set_state))
    if torch is not None:
        generator = torch.default_generator
        restorers.append(restoring(generator.get_state, generator.set_state))
        if torch.cuda.is_initialized():
            restorers.append(restoring(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return restorers


def _enter_thread(stack: ExitStack) -> None:
    """Reset the settings of this thread until the stack is closed."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        usual = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
        stack.enter_context(numpy.errstate(**usual))
    if torch is not None:
        stack.enter_context(_no_function_modes())
        stack.enter_context(torch.inference_mode(False))  # and with gradients
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Disable the torch function modes of this thread, such as a default device."""
    import torch
    from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode

    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        if modes:
            with torch.device("cpu"):
                yield
        else:
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
