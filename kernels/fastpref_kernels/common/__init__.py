"""Tiles, numerics, tile shapes and launches that all kernels share."""
