"""Integer kernels behind one small interface.

``reference`` defines the arithmetic in plain torch and runs anywhere; ``onednn`` runs it
on x86 processors, wherever its products are exact.  :func:`register` adds another.
"""

from dfq.runtime.registry import Backend, backends, explain, get, register, select

__all__ = ["Backend", "backends", "explain", "get", "register", "select"]
