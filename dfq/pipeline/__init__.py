"""Public functions, and the pipeline of inversion, data and quantization behind them."""
