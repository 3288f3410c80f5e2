"""The report: one self-contained HTML page about a plan, judged on a split that it was not fitted on."""

from offramp.report.curve import Curve, Point
from offramp.report.moving import gif, mp4
from offramp.report.page import Report, gather, render, write
from offramp.report.pictures import DenseExample
from offramp.report.stills import png
from offramp.report.walk import Said, Walk, load_walk, save_walk
from offramp.report.walks import render_walks

__all__ = [
    "Curve", "DenseExample", "Point", "Report", "Said", "Walk", "gather", "gif", "load_walk", "mp4", "png", "render",
    "render_walks", "save_walk", "write",
]
