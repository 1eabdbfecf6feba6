"""The public functions and what joins inversion, data and quantization."""
