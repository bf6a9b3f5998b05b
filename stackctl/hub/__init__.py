"""To the Hub and back. huggingface_hub is imported inside functions only."""
