"""Serving stacks: with stackctl, and with other programs."""
