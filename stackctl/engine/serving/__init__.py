"""Answers to many requests at once, of different stacks: by transformers in one running batch, or by llama.cpp."""
