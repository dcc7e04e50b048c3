"""Preference data: formats → tokens → planned batches."""
