"""Carry out a plan as files for other programs: streaming, read back, moved into place in one rename.

One module for each format, imported by itself: writing a plain LoRA needs neither transformers nor PEFT.
"""
