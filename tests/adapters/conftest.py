from calibration_fixtures import calibrated
from model_fixtures import edited, model, states

__all__ = ["calibrated", "edited", "model", "states"]
