"""PTQD: its checkpoints, and its correction of a quantized model's noise prediction."""
