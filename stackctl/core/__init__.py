"""What everything else stands on: errors, the grammar of expressions, the shape of every entry."""

from collections.abc import Callable

Say = Callable[[str], None]
"""What is told a line of text while something goes on, for a person to see."""
NOISE = 0.05
"""A difference that chance alone shows more often than this is called none."""
