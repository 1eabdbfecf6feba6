"""Other runtimes below :func:`dfq.load`, behind the same ``nn.Module``."""
