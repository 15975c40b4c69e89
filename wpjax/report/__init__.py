"""The report of a sweep: figures, and one HTML page that holds them all. It reads result files and does not use JAX."""

from wpjax.report.page import write_report

__all__ = ["write_report"]
