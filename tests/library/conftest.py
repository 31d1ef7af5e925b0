from model_fixtures import edited, model, states

__all__ = ["edited", "model", "states"]
