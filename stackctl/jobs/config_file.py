"""``train --config``: a job as YAML or JSON, by stackctl's own keys or by those of older scripts.

The scripts of the two-stage recipe named the base by its Hub id and the first stage by a *path*; both are looked up in
the registry here, so that such a file works as it is once the two are registered.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import NotFound, StackctlError, Usage, did_you_mean, gathering, raise_all
from stackctl.core.expressions import parse_expression, parse_name
from stackctl.core.schema import Adapter, Base, Stack
from stackctl.core.train_job import Recipe, TrainJob
from stackctl.lora.checkpoint import find_checkpoint_folder, read_checkpoint
from stackctl.registry.store import Registry
from stackctl.storage.paths import typed_path
from stackctl.storage.yaml_files import convert, read_document
from stackctl.storage.yaml_text import Document

_OLDER_BASE = ("base_model_name", "base_model", "base_model_name_or_path", "model_name_or_path", "model_name")
_OLDER_ON = ("stage1_adapter_path",)
_OLDER_KEYS = {
    **dict.fromkeys(_OLDER_BASE, "base"),
    **dict.fromkeys(_OLDER_ON, "on"),
    "dataset_path": "data",
    "data_path": "data",
    "eval_dataset_path": "eval_data",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_seq_length": "max_length",
    "lr_scheduler_type": "scheduler",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lr": "learning_rate",
    "packing": "pack",
}
# The registry knows where weights lie, and the rest changes nothing about what is learned.
_OLDER_IGNORED = ("output_dir", "overwrite_output_dir", "logging_steps", "save_total_limit")
_OWN = (*TrainJob.__struct_encode_fields__, "name")


@dataclass(frozen=True)
class JobFile:
    """What a configuration says of one adapter. ``ignored`` are keys of older scripts that have no meaning here."""

    values: dict[str, Any]
    name: str | None
    ignored: tuple[str, ...]


def is_recipe(path: Path) -> bool:
    """Whether a file says what to train by name, as ``stackctl.yaml`` does, and not one job."""
    value = read_document(path).value
    keys = set(value) if isinstance(value, dict) else set()
    own_of_a_job = {*_OWN, *_OLDER_KEYS, *_OLDER_IGNORED} - {*Recipe.__struct_fields__}
    return "train" in keys or not keys & own_of_a_job


def read_job(path: Path, registry: Registry) -> JobFile:
    """A job from a file; what older scripts called by path or Hub id becomes the name that it is registered by.

    Raises:
        NotFound, Usage: the file, its base or its first stage is not there, or a key or a value is wrong.
    """
    document = read_document(path)
    value = document.value
    if not isinstance(value, dict):
        raise Usage(f"{path}: expected a mapping of keys to values", hint="write key: value lines")
    if "train" in value:
        hint = f"build it: stackctl train --config {shlex.quote(str(path))}"
        raise Usage(f"{path} is a recipe of several adapters", hint=hint)
    problems: list[StackctlError] = []
    renamed = _rename(document, problems)
    values = renamed.value
    ignored = tuple(key for key in _OLDER_IGNORED if values.pop(key, None) is not None)
    name = values.pop("name", None)
    with gathering(problems):
        if name is not None and not isinstance(name, str):
            raise Usage(f"{document.where(('name',))}: 'name' is no text", hint="put it between quotes")
        if name is not None:
            parse_name(name)
    with gathering(problems):
        convert(renamed, TrainJob)
    raise_all(problems)
    if values.get("base") and not set(_OLDER_BASE).isdisjoint(value):
        values["base"] = _base_of(registry, values["base"])
    if values.get("on") and not set(_OLDER_ON).isdisjoint(value):
        values["on"] = _stack_of(registry, values["on"])
    return JobFile({k: v for k, v in values.items() if v not in (None, "")}, name, ignored)


def _rename(document: Document, problems: list[StackctlError]) -> Document:
    """Older keys by their present names. What is unknown or given twice is a problem."""
    renamed: dict[str, Any] = {}
    marks = dict(document.marks)
    for key, item in document.value.items():
        own = _OLDER_KEYS.get(key, key)
        where = document.where((key,))
        if own not in _OWN and own not in _OLDER_IGNORED:
            hint = did_you_mean(key, [*_OWN, *_OLDER_KEYS], f"known: {', '.join(_OWN)}")
            problems.append(Usage(f"{where}: unknown key '{key}'", hint=hint))
        elif own in renamed:
            problems.append(Usage(f"{where}: '{own}' is given twice, once as '{key}'", hint="remove one of them"))
        else:
            renamed[own] = item
            marks[(own,)] = document.marks[(key,)]
    return Document(renamed, marks, document.source)


def _base_of(registry: Registry, text: str) -> str:
    """The registered base that a name, a Hub id or a folder means.

    Raises:
        NotFound: none is.
    """
    if text in registry.names(Base):
        return text
    folder = typed_path(text)
    for base in registry.bases():
        if text.lower() in (base.source.lower(), (base.hub_id or "").lower()):
            return base.name
        if base.path and folder.exists() and (registry.root / base.path).resolve() == folder.resolve():
            return base.name
    name = folder.name.lower()
    raise NotFound(
        f"the base {text} is not registered",
        hint=did_you_mean(text, registry.names(Base), f"stackctl base add {name} {shlex.quote(text)}"),
    )


def _stack_of(registry: Registry, text: str) -> str:
    """The expression that ``stage1_adapter_path`` means: one as it stands, or the version that a checkpoint is.

    A checkpoint is known by its place, or by its digest when it was copied into the registry.

    Raises:
        NotFound: nothing is there, or it is not registered.
    """
    if _is_known_expression(registry, text):
        return text
    folder = typed_path(text)
    if not folder.exists():
        if "/" not in text:
            return text  # a name that is not there: resolving it names the nearest one
        raise NotFound(f"stage1_adapter_path: {text} does not exist", hint=f"stackctl add style {shlex.quote(text)}")
    checkpoint = read_checkpoint(find_checkpoint_folder(folder))
    place, digest = checkpoint.path.resolve(), checkpoint.digest()
    rows = [found for adapter in registry.adapters() for found in adapter.labelled().items()]
    known = [(label, version) for label, version in rows if version.digest == digest]
    for label, version in known or rows:  # what was changed since is known by its place alone
        if registry.weights_path(version) == place:
            return label
    if known:
        return known[0][0]
    raise NotFound(f"stage1_adapter_path: {text} is not registered", hint=f"stackctl add style {shlex.quote(text)}")


def _is_known_expression(registry: Registry, text: str) -> bool:
    try:
        terms = parse_expression(text)
    except StackctlError:
        return False
    known = {*registry.names(Adapter), *registry.names(Stack), *registry.names(Base)}
    return all(term.reference.name in known for term in terms)
