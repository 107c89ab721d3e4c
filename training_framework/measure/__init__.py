"""Measurements: comparisons, tuning, profiles, reports, and checks of exact resumption."""
