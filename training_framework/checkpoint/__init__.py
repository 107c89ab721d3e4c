"""Checkpoints: the whole state of a run in one file, written completely or not at all."""

from training_framework.checkpoint.file import read_description
from training_framework.checkpoint.keeper import CheckpointKeeper
from training_framework.checkpoint.loading import load_checkpoint, load_newest, previous_of
from training_framework.checkpoint.writing import save_checkpoint

__all__ = [
    "CheckpointKeeper",
    "load_checkpoint",
    "load_newest",
    "previous_of",
    "read_description",
    "save_checkpoint",
]
