"""Generated data sets with known preferences."""
