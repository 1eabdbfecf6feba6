"""timm models by name, with pretrained weights or without; what may need the network."""

from __future__ import annotations

import contextlib
import socket
import textwrap
import threading
import traceback
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from torch import nn

from dfq.argument_names import option
from dfq.errors import (
    DfqError,
    PretrainedError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
)
from dfq.failures import explained, first_line
from dfq.vit.description import check_description
from dfq.vit.folders import LOCAL_PREFIX, named_folder
from dfq.vit.structure import SUPPORTED

HUB_SOURCES = ("hf-hub", "hf_hub")
"""Prefixes of addresses on the hub, as timm knows them."""


def create_model(name: str, *, pretrained: bool = False, **keywords: Any) -> nn.Module:
    """Build a timm model by a name, an address on the hub or a folder.

    Addresses on the hub need their description, and ``pretrained`` the weights: both are
    downloaded unless the local cache has them.

    Raises:
        UnknownModelError: the address is not that of a timm model.
        UnsupportedModelError: the model does not take the keywords, or its description's.
        PretrainedError: a download failed.
        WeightsError: the pretrained weights do not fit the keywords.
    """
    with _fail_fast_offline():
        if ":" in name:
            _check_address(name)
        with explained(lambda error: _explain(error, name, pretrained, keywords)):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **keywords)
    return model


def _check_address(name: str) -> None:
    """Check the description of an address, which is downloaded if it is on the hub."""
    source, _, address = name.partition(":")
    if name.startswith(LOCAL_PREFIX):
        path = named_folder(name) / "config.json"
        if not path.is_file():
            raise UnknownModelError(f"{name!r} is no folder that timm saved: no config.json in it.")
    elif source in HUB_SOURCES and address:
        with explained(lambda error: _explain_address(error, name)):
            repository, _, revision = address.partition("@")
            path = Path(
                huggingface_hub.hf_hub_download(
                    repository, "config.json", revision=revision or None
                )
            )
    else:
        raise UnknownModelError(
            f"{name!r} is no address of a model: they begin with hf-hub: or {LOCAL_PREFIX} and "
            "go on with a repository or a folder."
        )
    with explained(lambda error: _explain_address(error, name)):
        check_description(path, name)


def _explain_address(error: Exception, name: str) -> DfqError:
    if name.startswith(LOCAL_PREFIX) or isinstance(error, ValueError):
        what = "folder that timm saved" if name.startswith(LOCAL_PREFIX) else "model of the hub"
        return UnknownModelError(f"{name!r} is no {what}: {first_line(error)}.")
    return _download_error(name, error)


def _explain(error: Exception, name: str, pretrained: bool, keywords: dict[str, Any]) -> DfqError:
    """Explain an error of timm by the library that raised it."""
    if pretrained and (isinstance(error, OSError) or _origin(error) not in ("timm", "torch")):
        return _download_error(name, error)
    if pretrained and _origin(error) == "torch" and isinstance(error, RuntimeError):
        return _shape_error(name, error)
    given = f" {keywords}" if keywords else " what its description says" if ":" in name else ""
    return UnsupportedModelError(
        f"{name!r} does not take{given or ' its own settings'} ({type(error).__name__}: "
        f"{first_line(error)}). Supported: {SUPPORTED}."
    )


def _origin(error: Exception) -> str:
    """Return the name of the package whose code raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""


def _shape_error(name: str, error: Exception) -> WeightsError:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return WeightsError(
        f"The pretrained weights of {name!r} do not fit what was asked for "
        f"({lines[0] if lines else error!s:.200}). Leave {option('num_classes')}, "
        f"{option('img_size')} and {option('global_pool')} out."
    )


def _download_error(name: str, error: Exception) -> PretrainedError:
    reason = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
    return PretrainedError(
        f"The pretrained weights of {name!r} cannot be downloaded and are not in the local "
        f"Hugging Face cache ({reason}). Connect to the network, or give a file of weights "
        f"with {option('weights', metavar='FILE')}."
    )


class _Offline:
    """The hub's offline mode, a setting of the whole process: on while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = huggingface_hub.constants.HF_HUB_OFFLINE
                huggingface_hub.constants.HF_HUB_OFFLINE = True
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                huggingface_hub.constants.HF_HUB_OFFLINE = self._before


_offline = _Offline()


@contextlib.contextmanager
def _fail_fast_offline() -> Iterator[None]:
    """Skip the hub's retries, which take a minute, if its host name cannot be resolved."""
    with contextlib.nullcontext() if _is_reachable() else _offline:
        yield


def _is_reachable() -> bool:
    """Whether the hub's host name can be resolved, or a proxy does so."""
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
