"""Which models answer a padded row as they answer it alone."""

from __future__ import annotations

from typing import Any

from stackctl.engine.base.configuration import longrope_lengths

_COUNT_PADDING = frozenset(
    {
        # positions are counted from the first column, padding or not
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "kosmos-2.5", "marian", "mbart", "mvp", "pegasus",
        "plbart", "prophetnet", "reformer", "roformer", "trocr", "whisper", "xlm", "xlnet",
        # a state takes up what is read, padding or not (and RWKV's code mixes the rows of a batch)
        "recurrent_gemma", "rwkv", "xlstm",
        # what a token sees is chosen by the count of columns, or by a mask of the model's own
        "cpmant", "deepseek_v4", "doge", "git", "paligemma",
    }
)  # fmt: skip
"""Types of model whose logits change with padding on the left, though an attention mask tells it: measured on a tiny
one of every type that transformers has, alone and in a batch (``python -m tests.stress.architectures``)."""


def can_pad(model: Any, longest: int | None = None) -> bool:
    """Whether a row padded on its left is answered as it is alone. Of a class that is not transformers' own, whose
    files came with the model, nothing is known: no.

    ``longest``: tokens of the longest text with its answer, None where that is not known.
    """
    text = model.config.get_text_config()
    bound = min([*longrope_lengths(model.config), *_lengths_of_choice(text)], default=None)
    if bound is not None and (longest is None or longest > bound):
        return False
    return model.config.model_type not in _COUNT_PADDING and type(model).__module__.startswith("transformers.")


def _lengths_of_choice(text: Any) -> list[int]:
    """Lengths in tokens beyond which an indexer chooses what each token sees, as in DeepSeek V3.2.

    Among tokens that it scores alike, and it scores many zero, the choice falls by their columns, which padding moves.
    MiniMax M3 counts blocks of columns, at any length.
    """
    found = [text.index_topk] if isinstance(getattr(text, "index_topk", None), int) else []
    return [*found, *([0] if "minimax_m3_sparse" in (getattr(text, "layer_types", None) or ()) else [])]
