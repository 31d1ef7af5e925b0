"""Evaluation: several allocations of one base, on the same prompts and noises, and how two of them compare."""
