"""What a stack is, whatever its members: written by the export, read back, and held against float64 by the definition.

Neither torch nor PEFT: members are files written by hand, with every layout that the tiny base has.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import (
    FINGERPRINT,
    base_modules,
    lora_config,
    lora_tensors,
    make_base,
    make_registry,
    safetensors_bytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.core.schema import AdapterVersion
from stackctl.engine.export.peft import export_peft
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.lora.lora_config import describe_lora
from stackctl.lora.safetensors_header import read_header
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.stacks import save_stack
from stackctl.registry.store import Registry
from stackctl.registry.versions import add_version

BASE = make_base()
KINDS = ["q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"]
Deltas = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """An adapter: on which modules it stands, how it is scaled, and from which seed its factors are drawn."""

    kinds: tuple[str, ...]
    rank: int
    alpha: int
    rslora: bool
    weight: float
    seed: int

    @property
    def modules(self) -> list[str]:
        return [name for name in base_modules() if name.rpartition(".")[2] in self.kinds]

    @property
    def values(self) -> dict[str, Any]:
        generator = np.random.default_rng(self.seed)
        shapes = lora_tensors(self.modules, self.rank)
        return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    def deltas(self) -> Deltas:
        """weight · scaling · B @ A of each module, in float64."""
        scale = self.weight * self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        return {name: scale * product for name, product in products(self.values).items()}

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        config = lora_config(
            r=self.rank, lora_alpha=self.alpha, use_rslora=self.rslora, target_modules=list(self.kinds)
        )
        (folder / "adapter_config.json").write_text(json.dumps(config))
        raw = safetensors_bytes({name: array.shape for name, array in self.values.items()})
        data = b"".join(array.tobytes() for array in self.values.values())
        (folder / "adapter_model.safetensors").write_bytes(raw[: len(raw) - len(data)] + data)
        return folder


def products(factors: dict[str, Any]) -> Deltas:
    """B @ A of each module, in float64, from tensors by their names in a checkpoint."""
    found = {}
    for name, a in factors.items():
        for mark in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(mark):
                b = factors[name.removesuffix(mark) + mark.replace("_A", "_B")]
                found[name.removeprefix("base_model.model.").removesuffix(mark)] = b.astype(float) @ a.astype(float)
    return found


def total(members: list[Member]) -> Deltas:
    found: Deltas = {}
    for member in members:
        for name, delta in member.deltas().items() if member.weight else ():
            found[name] = found.get(name, 0) + delta
    return found


def assert_alike(found: Deltas, wanted: Deltas, members: list[Member]) -> None:
    """Every module, as near as float32 can be to what is added up, however much of it cancels."""
    assert set(found) == set(wanted)
    for name, delta in wanted.items():
        size = sum(float(np.linalg.norm(m.deltas()[name])) for m in members if m.weight and name in m.deltas())
        assert float(np.linalg.norm(found[name] - delta)) <= 1e-6 * size


def members(smallest: int = 1) -> st.SearchStrategy[list[Member]]:
    weight = st.floats(-3, 3, width=16).filter(lambda value: abs(value) > 1e-2)
    member = st.builds(
        Member,
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple),
        rank=st.integers(1, 5),
        alpha=st.integers(1, 16),
        rslora=st.booleans(),
        weight=weight,
        seed=st.integers(0, 2**16),
    )
    return st.lists(member, min_size=smallest, max_size=4)


@contextmanager
def exported(found: list[Member]) -> Iterator[tuple[StackPlan, Path]]:
    """The plan of a stack, and the folder that its export has written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planned = [
            PlanMember(f"m{i}@1", m.weight, read_checkpoint(m.write(folder / f"m{i}")), f"m{i}")
            for i, m in enumerate(found)
        ]
        plan = plan_stack(BASE, planned).check()
        export_peft(plan, folder / "out")
        yield plan, folder / "out"


def read(folder: Path) -> dict[str, Any]:
    raw = (folder / "adapter_model.safetensors").read_bytes()
    header = read_header(folder / "adapter_model.safetensors").values()
    return {t.name: np.frombuffer(raw[t.start : t.end], "<f4").reshape(t.shape) for t in header}


few = settings(max_examples=40)


@few
@given(members())
def test_a_stack_is_the_sum_of_its_members(found: list[Member]) -> None:
    with exported(found) as (_, out):
        assert_alike(products(read(out)), total(found), found)


@few
@given(members())
def test_one_adapter_at_weight_one_is_itself(found: list[Member]) -> None:
    alone = replace(found[0], weight=1.0)
    with exported([alone]) as (plan, out):
        assert_alike(products(read(out)), alone.deltas(), [alone])
        assert {module.rank for module in plan.modules.values()} == {alone.rank}


@few
@given(members(smallest=2), st.randoms(use_true_random=False))
def test_the_order_of_members_changes_nothing(found: list[Member], chance: random.Random) -> None:
    shuffled = chance.sample(found, len(found))
    with exported(found) as (_, one), exported(shuffled) as (_, other):
        assert_alike(products(read(other)), products(read(one)), found)


@few
@given(members(smallest=2), st.integers(0, 3))
def test_weight_zero_is_absence(found: list[Member], place: int) -> None:
    place %= len(found)
    zero = [replace(m, weight=0.0) if i == place else m for i, m in enumerate(found)]
    with exported(zero) as (_, one), exported(found[:place] + found[place + 1 :]) as (_, other):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (one / file).read_bytes() == (other / file).read_bytes()


@few
@given(members())
def test_planned_shapes_are_the_written_ones(found: list[Member]) -> None:
    with exported(found) as (plan, out):
        written = {name: array.shape for name, array in read(out).items()}
        planned: dict[str, tuple[int, int]] = {}
        for name, module in plan.modules.items():
            rows, columns = module.shape
            embedding = module.type == "Embedding"
            kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            first, second = (columns, rows) if embedding else (rows, columns)
            planned[f"base_model.model.{name}.{kinds[0]}"] = (module.rank, second)
            planned[f"base_model.model.{name}.{kinds[1]}"] = (first, module.rank)
        assert written == planned


@few
@given(members())
def test_what_is_exported_is_planned_as_what_it_was(found: list[Member]) -> None:
    with exported(found) as (plan, out):
        again = plan_stack(BASE, [PlanMember("again@1", 1.0, read_checkpoint(out))])
        assert not again.problems
        assert {(n, m.type, m.shape, m.rank) for n, m in again.modules.items()} == {
            (n, m.type, m.shape, m.rank) for n, m in plan.modules.items()
        }
        assert {factor.scaling for module in again.modules.values() for factor in module.factors} == {1.0}


@few
@given(members(smallest=2), st.floats(-2, 2, width=16), st.integers(1, 3))
def test_nesting_equals_flattening(found: list[Member], weight: float, inner: int) -> None:
    """A stored stack as a term is its members, their weights multiplied."""
    inner = min(inner, len(found) - 1)
    with tempfile.TemporaryDirectory() as name:
        registry = make_registry(Path(name) / "registry", BASE)
        for i, member in enumerate(found):
            add(registry, f"m{i}", member.write(Path(name) / f"m{i}"))

        def text(which: range, times: float = 1.0) -> str:
            return "+".join(f"m{i}@1:{found[i].weight * times!r}" for i in which)

        outer = text(range(inner, len(found)))
        save_stack(registry, "inner", resolve_expression(registry, text(range(inner))))
        nested = read_plan(registry, resolve_expression(registry, f"inner:{weight!r}+{outer}"))
        flat = read_plan(registry, resolve_expression(registry, f"{text(range(inner), weight)}+{outer}"))
        assert [(m.label, m.weight) for m in nested.members] == [(m.label, m.weight) for m in flat.members]
        assert nested.modules == flat.modules
        assert not nested.problems


def add(registry: Registry, name: str, folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    add_version(registry, 
        name,
        lambda number: AdapterVersion(
            version=number, digest=checkpoint.digest(), path=str(folder), base=BASE.name, fingerprint=FINGERPRINT,
            created="2026-01-31T12:00:00Z", lora=describe_lora(checkpoint.config), parameters=checkpoint.parameters,
            dtype=checkpoint.dtype, bytes=checkpoint.bytes,
        ),
        None,
    )  # fmt: skip
