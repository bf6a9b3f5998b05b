"""What a device that is not there would be asked for: float64 of Apple's GPU, memory of GPUs that a run does not use.

Tensors on MPS are PyTorch's fake ones, which have a device and a type and no values; what MPS refuses, a float64 tensor
there or a copy that converts to float64 on the way, is refused by a mode of the dispatcher.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel

import stackctl.engine
from stackctl.engine import devices
from stackctl.engine.generation.logits_processors import processors
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.training import memory, trainer
from stackctl.engine.training.preferences import Scores
from stackctl.engine.training.state import RunState

MPS = torch.device("mps")
ROOMS = ("evaluation", "generation", "loss", "serving", "training")
ON_THE_CPU = {"evaluation/weight_fit.py", "training/preferences.py:measure", "training/orthogonal.py"}
"""Where float64 is asked for of tensors that are on the CPU, or not on MPS."""


class NoFloat64(TorchDispatchMode):
    """Refuses what MPS refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(some) if isinstance(t, Tensor)] for some in ((args, kwargs), found))
        there = any(t.device.type == "mps" for t in given)
        for tensor in made:
            if tensor.dtype == torch.float64 and (there or tensor.device.type == "mps"):
                raise TypeError(f"{func} makes a float64 tensor of one on MPS")
        return found


@pytest.fixture
def on_mps() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), NoFloat64():
        yield


def test_the_mode_refuses_what_mps_does(on_mps: None) -> None:
    tensor = torch.zeros(3, device=MPS)
    for asked in (
        lambda: tensor.double(),
        lambda: tensor.to("cpu", torch.float64),
        lambda: tensor.to(torch.zeros((), dtype=torch.float64)),
        lambda: torch.zeros(3, dtype=torch.float64, device=MPS),
    ):
        with pytest.raises(TypeError, match="float64"):
            asked()


def test_what_is_computed_in_float64_leaves_mps_first(on_mps: None) -> None:
    found = devices.float64(torch.zeros(3, device=MPS))
    assert (found.device.type, found.dtype) == ("cpu", torch.float64)
    assert devices.float64(torch.zeros(3, device="cpu")).device.type == "cpu"


def test_a_token_can_be_drawn_there(on_mps: None) -> None:
    drawing = processors(Sampling(temperature=0.7), [3, 3], [1, 2])
    scores = drawing(torch.zeros(2, 3, dtype=torch.long, device=MPS), torch.zeros(2, 50, device=MPS))
    assert (scores.device.type, scores.shape) == ("mps", (2, 50))


def test_a_step_can_be_counted_there(on_mps: None) -> None:
    state = RunState(MPS)
    state.add_loss(torch.zeros((), device=MPS))
    values = torch.zeros(2, device=MPS)
    state.add_answers(Scores(values, values, values, values, values))
    assert state._loss.device.type == state._pairs.device.type == "cpu"


def test_float64_is_asked_for_in_one_way_wherever_tensors_are_on_the_models_device() -> None:
    """``.double()`` and ``dtype=torch.float64`` are for tensors that are made on the CPU."""
    engine, found = Path(stackctl.engine.__file__).parent, set[str]()
    for path in (path for room in ROOMS for path in sorted((engine / room).rglob("*.py"))):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                asks = isinstance(call.func, ast.Attribute) and call.func.attr == "double"
                on_cpu = isinstance(call.func, ast.Attribute) and call.func.attr in ("tensor", "zeros", "eye", "rand")
                names = [ast.unparse(value) for value in (*call.args, *(k.value for k in call.keywords))]
                if asks or ("torch.float64" in names and not on_cpu):
                    found.add(f"{path.relative_to(engine)}:{function.name}")
    assert {place for place in found if place not in ON_THE_CPU and place.split(":")[0] not in ON_THE_CPU} == set()


def test_a_process_that_sees_several_gpus_trains_on_one(tiny_registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would make its micro-batches larger, and cut each along its first dimension, which is one row."""
    made = trainer.TrainingArguments

    def several(**settings: Any) -> Any:
        arguments = made(**settings)
        arguments._n_gpu = 2
        return arguments

    h = tiny_registry()
    options = ("--max-steps", 2, "--batch-size", 2)
    alone = h.train("alone", *options)
    monkeypatch.setattr(trainer, "TrainingArguments", several)
    beside = h.train("beside", *options)
    assert [beside[key] for key in ("loss", "tokens", "digest")] == [alone[key] for key in ("loss", "tokens", "digest")]


def test_random_numbers_are_kept_of_the_runs_own_gpu_alone() -> None:
    """``fork_rng`` without a list keeps those of every GPU, and each takes memory when it is first asked."""
    assert devices.generators_of(torch.device("cpu")) == devices.generators_of(MPS) == []
    assert devices.generators_of(torch.device("cuda", 3)) == [torch.device("cuda", 3)]


@pytest.mark.parametrize("hardware", [True, False])
def test_the_estimate_knows_of_autocast_on_a_gpu(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware)
    base = SimpleNamespace(dtype="float32", modules={})
    for dtype, expected in (("auto", "autocast" if hardware else "float32"), ("float32", "float32")):
        prepared: Any = SimpleNamespace(job=SimpleNamespace(dtype=dtype), base=base)
        assert memory._precision(prepared, torch.device("cuda")) == expected


def test_a_full_memory_while_answering_is_told_as_that(tiny_registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a model that transformers cannot generate with, though a few tokens alone run out of memory, too."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    h = tiny_registry("gpt2")
    h.add("style", seed=1)
    monkeypatch.setattr(GPT2LMHeadModel, "generate", full)
    error = h.run("generate", "style", "-p", "Hi", "--max-new-tokens", 2, "--json", code=1).json["error"]
    assert error["message"] == "the device's memory is full"
