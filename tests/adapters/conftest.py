from calibration_fixtures import calibrated
from model_fixtures import demo_pipe, edited, model, states

__all__ = ["calibrated", "demo_pipe", "edited", "model", "states"]
