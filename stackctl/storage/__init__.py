"""Files that are never half there: atomic writes, locks, remembered hashes, strict YAML."""
