"""Logits and loss of records in a row, computed only where a label is, and the attention that keeps them apart."""
