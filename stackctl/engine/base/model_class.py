"""The class of a base: what transformers makes of its configuration, and which of its modules the text goes through.

A model with a vision or audio tower is a base for text. Where transformers has no causal class for its configuration,
the class that the configuration names is taken whole; the towers are loaded with it and get no adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.quantizers.auto import get_hf_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config, QuantizationConfigMixin

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.libraries import replaced
from stackctl.registry.base_quantization import FOUR_BITS, Quantization, plain_name, stored_scheme
from stackctl.storage.files import read_json

_WHOLE = ("emu3",)
"""Model types whose text class finds none of its weights in files of the whole class."""


def model_class(folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class that a folder's weights are loaded into, and its configuration.

    Raises:
        Incompatible: transformers has no decoder for text of that kind, with the reason.
    """
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # huggingface_hub's checks of types are no ValueError
        raise _unknown(folder, raw, first_line(error)[:200]) from error
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(config) not in mapping or (kind in _WHOLE and mapping is MODEL_FOR_CAUSAL_LM_MAPPING):
            continue
        found: type[PreTrainedModel] = _get_model_class(config, mapping)
        if config.is_encoder_decoder and found.__name__ not in (raw.get("architectures") or ()):
            break  # its decoder alone is another model
        if config.is_encoder_decoder and mapping is MODEL_FOR_MULTIMODAL_LM_MAPPING:
            break
        return found, _config_for(found, config)
    named = ", ".join(str(name) for name in raw.get("architectures") or ())
    raise Incompatible(
        f"{folder} is a {named or kind}, which does not generate text",
        hint="a base is a causal language model, alone or inside a model that also sees or hears",
    )


def whole_model(folder: Path) -> PreTrainedModel | None:
    """The empty model of all of a folder, where :func:`model_class` is the class of its text alone."""
    found, _ = model_class(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return None
    whole: type[PreTrainedModel] = _get_model_class(config, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return None if whole is found else _empty(folder, whole, config)


def _config_for(found: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a composite configuration that a class for text alone is made from, as AutoModel chooses it."""
    if config.sub_configs.get("text_config") is None or found.config_class != config.sub_configs["text_config"]:
        return config
    text = config.get_text_config()
    if (scheme := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = scheme
    return text


def _unknown(folder: Path, raw: dict[str, Any], why: str) -> Incompatible:
    if raw.get("auto_map"):
        return Incompatible(
            f"{folder} needs code of its own (auto_map in config.json), which is not run",
            hint="take a conversion of it to a class of transformers' own, where there is one",
        )
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind not in transformers.CONFIG_MAPPING:
        return Incompatible(
            f"{folder} is of the type '{kind[:60]}', which transformers {transformers.__version__} does not know",
            hint="pip install --upgrade transformers, if a newer one has it",
        )
    return Incompatible(
        f"{folder} has a configuration that transformers {transformers.__version__} cannot read ({why})",
        hint="get config.json again from where the model came",
    )


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder without its weights: modules, and parameters on the meta device, as after loading.

    Raises:
        Incompatible: there is no class for it, or its configuration makes no model.
    """
    found, config = model_class(folder)
    return _empty(folder, found, config)


def _empty(folder: Path, found: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    try:
        with without_weights():
            model: PreTrainedModel = found._from_config(config)
            return model
    except ImportError as error:
        raise Incompatible(
            f"{found.__name__} needs a package that is not installed ({first_line(error)[:200]})",
            hint="install it, and try again",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise Incompatible(
            f"{folder} has a configuration of which no {found.__name__} can be made ({first_line(error)[:200]})",
            hint="get config.json again from where the model came",
        ) from error


def quantised_skeleton(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, HfQuantizer | None]:
    """The empty model as ``from_pretrained`` prepares it to take a folder's tensors, with what reads its scheme."""
    found, config = model_class(folder)
    scheme = stored_scheme(folder)
    if scheme is None:
        return _empty(folder, found, config), None
    quantizer, config, _ = get_hf_quantizer(config, reading(scheme), {"": "cpu"}, True, {})
    config.dtype = dtype
    with torch.device("meta"):
        model = found._from_config(config, dtype=dtype)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=[])
    return model, quantizer


def check_scheme(scheme: Quantization | None, folder: Path, source: str) -> None:
    """A model whose weights are plain, or in a scheme that is read.

    Raises:
        Incompatible: they are in another, with its name and the plain model's.
    """
    if scheme is None or scheme.is_read:
        return
    plain = plain_name(source) or plain_name(str(read_json(folder / "config.json").get("_name_or_path") or ""))
    why = f" ({scheme.why_refused})" if scheme.why_refused else ""
    raise Incompatible(
        f"{folder} is stored quantised, by {scheme.label}, which cannot be read as plain weights here{why}",
        hint=f"use the plain model: stackctl base add NAME {plain}" if plain else "use the model it was made from",
    )


def reading(scheme: Quantization) -> QuantizationConfigMixin | None:
    """What ``from_pretrained`` is told so that a scheme that is read becomes plain weights; None where nothing is."""
    if scheme.method == FOUR_BITS:
        return None  # loaded as stored, and turned into plain weights then
    return Mxfp4Config(dequantize=True) if scheme.method == "mxfp4" else FineGrainedFP8Config(dequantize=True)


_register = nn.Module.register_parameter


def _register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if parameter is not None and not parameter.is_meta and not is_lazy(parameter):
        empty = torch.empty_like(parameter, device="meta")
        parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    _register(module, name, parameter)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Parameters of modules that are made in the body are on the meta device; nothing is initialised, tied is tied.

    transformers makes a whole model there. Each operation on a buffer, such as the angles of rotary positions, then
    goes through torch's decompositions in Python, which import sympy: half a second, and half of what reading SmolLM2's
    weights takes on two slow cores. Here buffers are computed.
    """
    with (
        initialization.no_init_weights(),
        replaced(PreTrainedModel, "init_weights", lambda model: model.tie_weights(recompute_mapping=False)),
        replaced(nn.Module, "register_parameter", _register_without_memory),
    ):
        yield


@contextlib.contextmanager
def loading_into(loader: type[PreTrainedModel]) -> Iterator[None]:
    """``loader.from_pretrained`` in the body makes its model so (``get_init_context``, transformers 5.23).

    It gives what was not in the files, and buffers that never are, their values afterwards.
    """
    own = loader.get_init_context

    def contexts(*given: Any) -> list[Any]:
        return [*(one for one in own(*given) if not isinstance(one, torch.device)), without_weights()]

    with replaced(loader, "get_init_context", contexts):
        yield
