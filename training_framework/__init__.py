"""Efficient ResNet training: every optimization is a switch, and every switch is measured."""

__version__ = "0.1.0"
