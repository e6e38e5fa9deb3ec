"""Round weights to a low-bit grid and back."""

from kernels_peft.fake_quantization.op import fake_quantize
from kernels_peft.fake_quantization.reference import fake_quantize_reference

__all__ = ["fake_quantize", "fake_quantize_reference"]
