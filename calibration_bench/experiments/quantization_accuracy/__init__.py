"""The experiment ``quantization-accuracy`` and its tables."""
