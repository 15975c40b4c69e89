"""The report of a sweep: figures and one self-contained HTML page. Knows the result file, not JAX."""

from wpjax.report.page import write_report

__all__ = ["write_report"]
