"""The calibration of ApiQ: clipping and LoRA of every block, found on a few samples of text."""

from apiq_peft.calibration.engine import Result, calibrate
from apiq_peft.calibration.finite import CalibrationError
from apiq_peft.calibration.reports import BlockReport, LayerReport
from apiq_peft.calibration.settings import PRESETS, Calibration, preset

__all__ = [
    "PRESETS",
    "BlockReport",
    "Calibration",
    "CalibrationError",
    "LayerReport",
    "Result",
    "calibrate",
    "preset",
]
