"""llama.cpp as an engine: a base that came from a GGUF file, and GGUF adapters beside it with scales of a request."""
