from calibration_fixtures import calibrated
from model_fixtures import edited, model, states, text_pipe, tokenizer

__all__ = ["calibrated", "edited", "model", "states", "text_pipe", "tokenizer"]
