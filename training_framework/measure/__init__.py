"""Measuring: comparisons, tuning, profiles, reports, and the proof of exact resumption."""
