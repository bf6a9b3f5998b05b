"""The loss curve of a run of training: read from its log, drawn as SVG and on a terminal."""

from stackctl.render.loss_curve.log import LOG, Curve, Point, parse_curve, read_curve
from stackctl.render.loss_curve.svg import PICTURE, render_svg
from stackctl.render.loss_curve.terminal import render_terminal

__all__ = ["LOG", "PICTURE", "Curve", "Point", "parse_curve", "read_curve", "render_svg", "render_terminal"]
