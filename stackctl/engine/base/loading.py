"""The weights of a base in memory: as transformers itself loads them, or not at all.

What transformers cannot find it makes up at random, and what it has no use for it leaves out, both with a warning; here
either is an error.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.loading_report import LoadStateDictInfo

from stackctl.core.errors import Incompatible, first_line, listed
from stackctl.engine.base.configuration import read_generation_config
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.base.model_class import check_scheme, empty_model, loading_into, model_class, reading, whole_model
from stackctl.engine.base.module_shapes import is_called, module_shapes, text_modules
from stackctl.engine.base.weight_conversion import load_converting
from stackctl.lora.target_modules import natural_order
from stackctl.registry.base_quantization import FOUR_BITS, stored_scheme

_WITHOUT_WORDS = ("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel", "Model")
"""Ends of the names of classes without a head that a text goes on by."""


def load_weights(
    folder: Path, dtype: torch.dtype, device: torch.device, *, four_bits: bool = False, converts: bool = False
) -> PreTrainedModel:
    """The model of a folder in ``dtype`` on ``device``.

    Weights stored in a scheme become plain ones; ``four_bits`` keeps those that bitsandbytes stored, and puts plain
    linear layers in four bits. ``converts``: the files have another dtype than ``dtype``, and the device is the CPU.

    Raises:
        Incompatible: the scheme is not read, is another than the four bits wanted, or its package is not there; tensors
            are missing, too many, or of other shapes.
    """
    scheme = stored_scheme(folder)
    check_scheme(scheme, folder, str(folder))
    if four_bits and scheme is not None and scheme.method != FOUR_BITS:
        raise Incompatible(
            f"{folder} is stored quantised already, by {scheme.label}: it cannot be put in four bits by --dtype nf4",
            hint="leave out --dtype nf4: its weights are read as plain ones",
        )
    if scheme is None and converts:
        converted, found = load_converting(folder, dtype)
        check_keys(found, folder, converted)
        return converted
    read_generation_config(folder)  # whatever is odd about it, from_pretrained says in no words of its own
    if four_bits or (scheme is not None and scheme.method == FOUR_BITS):
        _check_bitsandbytes(needed=scheme is not None)
    settings: Any = reading(scheme) if scheme is not None else _nf4(dtype, folder) if four_bits else None
    loader: Any  # with output_loading_info it returns a pair, which its annotation leaves out
    loader, config = model_class(folder)
    try:
        with contextlib.nullcontext() if settings is not None else loading_into(loader):
            model, found = loader.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                quantization_config=settings,
                device_map={"": device} if device.type != "cpu" or scheme is not None else None,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (ImportError, ValueError) as error:
        if scheme is None:
            raise
        raise Incompatible(
            f"{folder} is stored quantised, by {scheme.label}, and cannot be read: {first_line(error)[:200]}",
            hint="use the model that it was made from",
        ) from error
    check_keys(found, folder, model)
    if scheme is not None and scheme.method == FOUR_BITS and not four_bits:
        model = model.dequantize(dtype)
    elif four_bits:
        _keep_unpacked(model)
    loaded: PreTrainedModel = model
    return loaded


def check_keys(found: dict[str, Any], folder: Path, model: PreTrainedModel) -> None:
    """Hold what ``from_pretrained`` reported of loading ``model`` against a folder.

    Weights of a tower that the text does not go through are taken by nothing in a class for text alone.

    Raises:
        Incompatible: tensors are missing, have other shapes, or nothing in the model takes them.
    """
    unexpected = _not_of_towers(set(found["unexpected_keys"]), folder, model) if found["unexpected_keys"] else set()
    problems = {
        "has no weights for": found["missing_keys"],
        "has weights of other shapes than its configuration for": {name for name, *_ in found["mismatched_keys"]},
        "has weights that nothing in its configuration's model takes:": unexpected,
        "cannot be converted:": {str(message) for message in found.get("error_msgs") or ()},
    }
    if told := [f"{what} {listed(sorted(names, key=natural_order))}" for what, names in problems.items() if names]:
        hint = "config.json and the weights are not of one model: get both again from where they came"
        own = next(iter(model.config.architectures or ()), "")
        if own.endswith(_WITHOUT_WORDS):
            hint = f"it is a {own}, which has no head for words: give a model that goes on with a text"
        raise Incompatible(f"{folder} {', and '.join(told)}", hint=hint)


def _not_of_towers(names: set[str], folder: Path, model: PreTrainedModel) -> set[str]:
    """Those of some names that are no weights of a tower in the whole of a folder's model."""
    whole = whole_model(folder)
    if whole is None:
        return names
    layout, text = BaseLayout(folder, whole), text_modules(whole)
    towers = {name for group in layout.groups if group.first.rpartition(".")[0] not in text for name in group.sources}
    if stored_scheme(folder) is not None:
        return names - towers
    own = BaseLayout(folder, model)
    left = LoadStateDictInfo(set(), {name for name in own.unexpected if name not in towers}, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(left)
    return left.unexpected_keys


def _check_bitsandbytes(*, needed: bool) -> None:
    """bitsandbytes, for a base that is stored so (``needed``) or is to be.

    Raises:
        Incompatible: it has nothing that runs on this machine.
    """
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # what it raises depends on which library it misses
        hint = "use --dtype bfloat16, of two bytes a weight"
        if needed:
            hint = "pip install 'stackctl-lora[quant]', or use the model that it was made from"
        raise Incompatible(f"bitsandbytes does not run on this machine ({error})", hint=hint) from error


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Leave weights of four bits as they are stored, on every CPU.

    On a CPU with AVX512-BF16 bitsandbytes (0.50) packs them when they are first multiplied without gradients. That
    rounds their scales to bfloat16, no gradient goes through what is packed (its product has no backward pass, so
    training after an evaluation would be wrong without a word), and rows narrower than a block cannot be packed.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _nf4(computing: torch.dtype, folder: Path) -> BitsAndBytesConfig:
    """Weights of linear modules in four bits, as QLoRA has them (https://arxiv.org/abs/2305.14314).

    Not of those whose weight the model reads by itself, which could not be told from packed bytes.
    """
    model = empty_model(folder)
    read = [name for name in module_shapes(model) if not is_called(model, name)]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computing,
        llm_int8_skip_modules=[*get_keys_to_not_convert(model), *read] if read else None,
    )  # fmt: skip
