"""Packed data sets: many images in few files."""
