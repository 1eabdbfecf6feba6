"""Backends with the kernels of integer layers.

``reference`` defines the arithmetic in plain torch; ``onednn`` is used on x86 processors on which
its products are exact, ``int_mm`` on GPUs for layers that it multiplies faster than ``float``, and
``float`` elsewhere.  :func:`register` adds a backend.
"""

from dfq.runtime.registry import Backend, backends, explain, get, refusals, register, select

__all__ = ["Backend", "backends", "explain", "get", "refusals", "register", "select"]
