"""The loss curve of a run of training: read from its log, drawn as SVG and on a terminal."""

from stackctl.showing.curve.points import LOG, Curve, Point, parse_curve, read_curve
from stackctl.showing.curve.svg import PICTURE, render_svg
from stackctl.showing.curve.terminal import render_terminal

__all__ = ["LOG", "PICTURE", "Curve", "Point", "parse_curve", "read_curve", "render_svg", "render_terminal"]
