"""Strict YAML: what people mean, and nothing that surprises them; every error with its place."""
