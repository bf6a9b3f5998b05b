"""Records to tokens and labels, rows of documents, and batches without padding."""
