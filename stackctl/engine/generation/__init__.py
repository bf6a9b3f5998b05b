"""Text from a base with a stack on it: prompts to tokens, how tokens are chosen, where an answer ends, the run."""

from stackctl.engine.generation.ends import end_tokens
from stackctl.engine.generation.prompts import fit_conversation
from stackctl.engine.generation.remembering import Remembered
from stackctl.engine.generation.running import Generated, generate, generate_reply
from stackctl.engine.generation.sampling import Sampling

__all__ = ["Generated", "Remembered", "Sampling", "end_tokens", "fit_conversation", "generate", "generate_reply"]
