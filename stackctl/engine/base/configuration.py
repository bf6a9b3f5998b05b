"""What the configurations of a base say: numbers, by whatever name they have them, and how it generates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl.core.errors import Incompatible, first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig


def context_length(config: Any) -> int | None:
    """How many tokens a model takes; None where it says none, or -1 as XLNet does for any number."""
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def cached_numbers(config: Any) -> int:
    """How many numbers the keys and values of one token are, in all layers."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # it keeps a state instead, which does not grow
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width)


def longrope_lengths(config: Any) -> list[int]:
    """Lengths in tokens beyond which a model turns all positions by other angles, those of every row by the longest
    one's: LongRoPE (https://arxiv.org/abs/2402.13753), as Phi 3 has it."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(own for own in rope.values() if isinstance(own, dict))]  # one for each type of layer
    return [own["original_max_position_embeddings"] for own in kinds if own.get("rope_type") == "longrope"]


def positions_change(model: Any) -> bool:
    """Whether a model turns rotary positions by other angles where a text is longer, and writes them anew: what was
    computed of a shorter text is not that of a longer one."""
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())  # one, or one for each type of layer
    return any(changing in kind for kind in kinds for changing in ("dynamic", "longrope"))


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """A base's generation configuration; None where it has none, or none that is JSON, as transformers takes it.

    Raises:
        Incompatible: it holds what no generation configuration can.
    """
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        ends = found.eos_token_id
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
            raise ValueError(f"eos_token_id is {ends!r}")
        return found
    except OSError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Incompatible(
            f"{folder / 'generation_config.json'} cannot be read ({first_line(error)[:200]})",
            hint="get generation_config.json again from where the model came",
        ) from error
