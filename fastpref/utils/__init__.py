"""Shared helpers: errors, atomic files, progress display and versions."""
