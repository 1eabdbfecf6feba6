"""The experiment ``gpu-check`` and its tables."""
