"""Text from a base with a stack on it: prompts to tokens, how tokens are chosen, where an answer ends, the run."""

from stackctl.engine.generation.answers import generate, generate_reply
from stackctl.engine.generation.prefix_cache import PrefixCache
from stackctl.engine.generation.prompts import fit_conversation
from stackctl.engine.generation.reader import AnswerEngine, Generated
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.generation.stopping import end_tokens

__all__ = [
    "AnswerEngine",
    "Generated",
    "PrefixCache",
    "Sampling",
    "end_tokens",
    "fit_conversation",
    "generate",
    "generate_reply",
]
