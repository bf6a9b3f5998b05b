"""A base model: its class, its files, its entry, its weights in memory."""
