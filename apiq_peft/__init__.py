"""ApiQ: models of 2-, 3- and 4-bit weights whose LoRA makes up for the rounding.

Importing this package teaches PEFT the type APIQ and transformers the checkpoints of packed models
(`quant_method: apiq`), so that their own `from_pretrained` read both. Before the import neither
knows them.
"""

from apiq_peft._register import register
from apiq_peft.calibration import PRESETS, Calibration, CalibrationError, preset
from apiq_peft.checkpoint import ApiQQuantizationConfig, dequantize
from apiq_peft.config import ApiQConfig
from apiq_peft.export import export_gptq, export_lora, export_plain
from apiq_peft.gptq import load_gptq
from apiq_peft.layer import ApiQLinear
from apiq_peft.model import ApiQModel
from apiq_peft.packed import PackedLinear
from apiq_peft.quantize import quantize, quantize_folder
from apiq_peft.samples import samples_of

__all__ = [
    "PRESETS",
    "ApiQConfig",
    "ApiQLinear",
    "ApiQModel",
    "ApiQQuantizationConfig",
    "Calibration",
    "CalibrationError",
    "PackedLinear",
    "dequantize",
    "export_gptq",
    "export_lora",
    "export_plain",
    "load_gptq",
    "preset",
    "quantize",
    "quantize_folder",
    "register",
    "samples_of",
]

register()
