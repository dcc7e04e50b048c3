"""`fastpref report`: one page with charts, their readings and tables of finished or live runs."""

from fastpref.report.page import report

__all__ = ["report"]
