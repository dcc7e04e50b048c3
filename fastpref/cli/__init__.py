"""The `fastpref` command."""

from fastpref.cli.app import main

__all__ = ["main"]
