"""Tiles, numerics, tile shapes and launches shared by all kernels."""
