"""Errors, files, progress, versions: what any part may import."""
