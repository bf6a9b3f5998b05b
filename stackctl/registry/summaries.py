"""Entries in short: what a question about all of them needs, for :mod:`stackctl.registry.index` to keep."""

from __future__ import annotations

import math

import msgspec

from stackctl.core.schema import Adapter, AdapterVersion


class VersionRow(msgspec.Struct, frozen=True, array_like=True):
    """A version of an adapter, in short; ``loss`` is None where none is known."""

    version: int
    digest: str
    path: str
    base: str
    trained_on: list[str]
    created: str
    rank: int
    parameters: int
    bytes: int
    loss: float | None


class AdapterRow(msgspec.Struct, frozen=True, array_like=True):
    """An adapter with all its versions, in short, newest last."""

    name: str
    description: str
    versions: list[VersionRow]


def adapter_row(adapter: Adapter) -> AdapterRow:
    """What a row says of an adapter."""
    return AdapterRow(adapter.name, adapter.description, [version_row(version) for version in adapter.versions])


def version_row(version: AdapterVersion) -> VersionRow:
    """What a row says of a version."""
    loss = version.run.loss if version.run and math.isfinite(version.run.loss) else None
    return VersionRow(
        version.version, version.digest, version.path, version.base, version.trained_on, version.created,
        version.lora.r, version.parameters, version.bytes, loss,
    )  # fmt: skip
