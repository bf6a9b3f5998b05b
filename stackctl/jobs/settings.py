"""The settings that a version was trained with, in a form that can be compared with those of a job."""

from __future__ import annotations

from typing import Any

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.schema import AdapterVersion
from stackctl.core.train_job import TrainSettings
from stackctl.jobs.trained_tokens import parse_tokens
from stackctl.lora.target_modules import parse_targets


def settings_of(name: str, version: AdapterVersion) -> TrainSettings:
    """The settings that a version was trained with; what its entry leaves out was at its default.

    Raises:
        Usage: they are none.
    """
    told = {key: value for key, value in (version.settings or {}).items() if key in TrainSettings.__struct_fields__}
    try:
        return msgspec.convert(told, TrainSettings)
    except msgspec.ValidationError as error:
        raise Usage(
            f"the settings of {name}@{version.version} cannot be read: {error}",
            hint=f"fix adapters/{name}.yaml in the registry",
        ) from None


def outcome(settings: TrainSettings, *, watched: bool = True) -> dict[str, Any]:
    """Settings in a form that is equal where training makes the same of them; ``watched``: on held-out records."""
    told: dict[str, Any] = msgspec.to_builtins(settings)
    targets = parse_targets(told["target_modules"])
    told["target_modules"] = sorted(targets) if isinstance(targets, list) else targets
    tokens = parse_tokens(told["train_tokens"])
    told["train_tokens"] = sorted(tokens) if isinstance(tokens, list) else tokens
    told["alpha"] = told["alpha"] if told["alpha"] is not None else 2 * told["rank"]
    ignored = () if watched else ("eval_steps", "keep", "patience")
    return {key: value for key, value in told.items() if key not in ignored}
