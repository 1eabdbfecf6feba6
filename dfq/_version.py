"""The version of dfq."""

__version__ = "0.1.0"
