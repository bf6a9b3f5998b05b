"""A PEFT checkpoint by its header, and which modules of a base a LoRA can stand on. No tensors."""
