"""Training of the controller: T2Q on labels, then Q2B on a quantized model's own trajectories (docs/method.md)."""

from __future__ import annotations

from .q2b import (
    Q2BRecord,
    Q2BTraining,
    mac_weights,
    new_controller,
    schedule,
    train_controller,
    train_on_base,
    train_q2b,
)
from .t2q import T2QTraining, as_text, fold_standardisation, train_t2q
from .trained_t2q import HeldShare, HeldValue, RankNormaliser, Split, TrainedT2Q, TrainedT2QConfig, rows_of

__all__ = [
    "HeldShare",
    "HeldValue",
    "Q2BRecord",
    "Q2BTraining",
    "RankNormaliser",
    "Split",
    "T2QTraining",
    "TrainedT2Q",
    "TrainedT2QConfig",
    "as_text",
    "fold_standardisation",
    "mac_weights",
    "new_controller",
    "rows_of",
    "schedule",
    "train_controller",
    "train_on_base",
    "train_q2b",
    "train_t2q",
]
