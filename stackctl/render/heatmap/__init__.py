"""Numbers of a model's modules as a map: layers across, kinds of module down; for a terminal and as SVG."""

from stackctl.render.heatmap.grid import Cell, Grid, Place, arrange, place, short_names
from stackctl.render.heatmap.terminal import HeatMap, render_terminal

__all__ = ["Cell", "Grid", "HeatMap", "Place", "arrange", "place", "render_terminal", "short_names"]
