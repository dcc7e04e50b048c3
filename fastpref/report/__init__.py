"""`fastpref report`: what runs have left on disk, as one page of pictures, readings and tables."""

from fastpref.report.page import report

__all__ = ["report"]
