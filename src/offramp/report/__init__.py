"""The report: one self-contained HTML page about a plan, judged on a split that it was not fitted on."""

from offramp.report.curve import Curve, Point
from offramp.report.page import Report, gather, render, write
from offramp.report.pictures import DenseExample

__all__ = ["Curve", "DenseExample", "Point", "Report", "gather", "render", "write"]
