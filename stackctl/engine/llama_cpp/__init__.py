"""llama.cpp as an engine: a base that came from a GGUF file, and GGUF adapters beside it with scales of a request."""

from stackctl.engine.llama_cpp.engine import LlamaCpp
from stackctl.engine.llama_cpp.loading import load_llama_cpp

__all__ = ["LlamaCpp", "load_llama_cpp"]
