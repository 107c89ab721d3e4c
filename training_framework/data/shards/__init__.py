"""Packed data sets: many images in a few files."""
