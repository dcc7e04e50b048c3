"""Synthetic data sets with known preferences."""
