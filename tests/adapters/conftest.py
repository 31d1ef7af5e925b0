from calibration_fixtures import calibrated
from model_fixtures import calibrate, demo_pipe, edited, model, states

__all__ = ["calibrate", "calibrated", "demo_pipe", "edited", "model", "states"]
