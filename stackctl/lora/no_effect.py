"""Whether an adapter changes anything at all, by the bytes of its factors: no tensor is built."""

from __future__ import annotations

from pathlib import Path

from stackctl.lora.checkpoint import Checkpoint
from stackctl.lora.safetensors_header import TensorInfo

NO_EFFECT = "is without effect: all of its deltas are zero, as they are before the first step of a training"
_PIECE = 1 << 20


def has_no_effect(checkpoint: Checkpoint) -> bool:
    """Whether every delta is zero, since one of its factors or its alpha is, and nothing else was trained.

    An adapter that does something is found out by its first pair.
    """
    if any(slot.role not in ("A", "B", "aside") for slot in checkpoint.slots.values()):
        return False
    config = checkpoint.config
    if config.get("lora_alpha") == 0 and not any((config.get("alpha_pattern") or {}).values()):
        return True
    pairs = [list(pair.values()) for pair in checkpoint.pairs.values()]
    return bool(pairs) and all(any(_is_zero(checkpoint.weights_path, t) for t in reversed(pair)) for pair in pairs)


def _is_zero(path: Path, tensor: TensorInfo) -> bool:
    """Whether a tensor's values are all 0 or -0."""
    with path.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.end - tensor.start
        while left:
            piece = stream.read(min(left, _PIECE))
            if not piece or piece.translate(None, b"\x00\x80"):
                return False
            left -= len(piece)
    return True
