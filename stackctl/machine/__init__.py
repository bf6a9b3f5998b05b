"""This machine: what it has, and what of a model it can hold."""
