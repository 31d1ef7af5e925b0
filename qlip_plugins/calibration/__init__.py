"""Post-training calibration of a diffusers UNet in the manner of Q-Diffusion or PTQD (docs/method.md, Calibrate)."""

from .run import Calibration, calibrate
from .settings import CalibrationSettings

__all__ = ["Calibration", "CalibrationSettings", "calibrate"]
