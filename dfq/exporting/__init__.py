"""Checkpoints as files that other runtimes execute: ONNX, TensorRT, OpenVINO, ``torch.export``."""
