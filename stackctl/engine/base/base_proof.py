"""A base proved once: its logits, as it is loaded here, are those of what transformers loads by itself.

Here a class for text is taken out of one that sees, dtypes are converted a tensor at a time, and stored schemes become
plain weights; none of it may change what the model computes.
"""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stackctl.core.errors import VerificationFailed
from stackctl.core.schema import Base, Proof
from stackctl.engine.base.loading import load_weights
from stackctl.engine.base.tokenizer import load_tokenizer
from stackctl.engine.tensors import without_ruled_out
from stackctl.registry.base_models import weight_files
from stackctl.registry.base_quantization import FOUR_BITS
from stackctl.storage.atomic import write_atomic
from stackctl.storage.files import read_json_if_any
from stackctl.storage.paths import cache_root

MOST_BYTES = 1 << 30
"""The largest weights that are loaded twice without being asked to: a few seconds."""
TOLERANCE = 1e-4
"""By how much logits may differ, as a share of the largest; the same operations on the same weights differ by none."""
_TEXT = "The sea was calm that morning, and 12 people walked along the shore."


def is_small(folder: Path) -> bool:
    """Whether a base can be loaded twice in seconds."""
    return sum(path.stat().st_size for path in weight_files(folder)) <= MOST_BYTES


def prove_base(base: Base, folder: Path) -> Proof | None:
    """Compare the logits of both models.

    Done once for each base and version of transformers, and remembered in the cache. None where it cannot be told:
    transformers by itself computes nothing of a text with it, or not the same twice.

    Raises:
        VerificationFailed: the logits are others.
    """
    version = transformers.__version__
    place = cache_root() / "proofs" / f"{base.fingerprint.removeprefix('sha256:')[:32]}-{version}.json"
    known = read_json_if_any(place).get("difference")
    if isinstance(known, float):
        return Proof(transformers=version, difference=known)
    difference = _difference(base, folder)
    if difference is None:
        return None
    if difference > TOLERANCE:
        raise VerificationFailed(
            f"the logits of '{base.name}' as it is loaded here are not those of transformers' own loading: they differ "
            f"by {difference:.1e} of the largest",
            hint="do not use it, and report which model it is; --no-prove registers it all the same",
        )
    with contextlib.suppress(OSError):
        write_atomic(place, json.dumps({"difference": difference}))
    return Proof(transformers=version, difference=difference)


def _difference(base: Base, folder: Path) -> float | None:
    if base.quantization == FOUR_BITS:  # by itself transformers computes in four bits, where other roundings are
        return None
    tokens = load_tokenizer(folder)(_TEXT)["input_ids"]
    ids = torch.tensor([[token for token in tokens if token < base.vocabulary_size][:32] or [1, 2, 3]])
    plain = _plain_logits(folder, ids)
    if plain is None:
        return None
    model = load_weights(
        folder, torch.float32, torch.device("cpu"), converts=base.dtype != "float32" and base.quantization is None
    )
    own = _logits(model.eval(), ids)
    return float((own - plain).abs().max() / plain.abs().max().clamp_min(1e-30))


def _plain_logits(folder: Path, ids: Tensor) -> Tensor | None:
    """The logits of what transformers loads whole, if it computes any, and the same twice."""
    settings = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaders: list[Any] = [AutoModelForCausalLM] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else []
        for loader in [*loaders, AutoModelForMultimodalLM]:
            model, told = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **settings)
            if not told["missing_keys"] and not told["mismatched_keys"]:
                first, second = _logits(model.eval(), ids), _logits(model, ids)
                return first if bool(first.isfinite().all()) and torch.allclose(first, second, atol=1e-6) else None
    except Exception:  # whatever its code raises on a text alone: there is nothing to compare with
        return None
    return None


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = without_ruled_out(model(input_ids=ids, use_cache=False).logits).float()
    gc.collect()
    return found
