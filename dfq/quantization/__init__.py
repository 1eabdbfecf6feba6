"""Post-training quantization of a ViT from a sparse-image dataset."""

from dfq.quantization.calibrate import Calibration, calibrate
from dfq.quantization.layers import IntegerLinear
from dfq.quantization.model import QuantizedViT, quantize_vit

__all__ = ["Calibration", "IntegerLinear", "QuantizedViT", "calibrate", "quantize_vit"]
