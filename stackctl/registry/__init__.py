"""The only reader and writer of ``registry/``: a store of small files, and functions on it, a module for each idea."""
