"""Checkpoints as files that other runtimes execute: ONNX, OpenVINO, ``torch.export``."""
