from model_fixtures import edited, model, states, text_pipe, tokenizer

__all__ = ["edited", "model", "states", "text_pipe", "tokenizer"]
