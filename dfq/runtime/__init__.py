"""Backends with the kernels of integer layers.

``reference`` defines the arithmetic in plain torch and runs anywhere; ``onednn`` is used on x86
processors on which its products are exact.  :func:`register` adds a backend.
"""

from dfq.runtime.registry import Backend, backends, explain, get, register, select

__all__ = ["Backend", "backends", "explain", "get", "register", "select"]
