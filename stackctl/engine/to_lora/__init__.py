"""A plain LoRA out of something else: a full fine-tune, another kind of adapter, other programs' files."""
