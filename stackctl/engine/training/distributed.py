"""The processes that train together: joined once, in step at every point where one of them writes.

Alone, a process is a group of one, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather, gather_object
from torch import Tensor
from torch.utils.data import Sampler

from stackctl.core.errors import Failed
from stackctl.engine.devices import exact_device
from stackctl.jobs import ranks

T = TypeVar("T")


def join(device: torch.device) -> None:
    """Join the group that the launcher made.

    Raises:
        Failed: the group is not what was launched.
    """
    if not ranks.is_launched():
        return
    if device.type == "cpu":  # else accelerate takes the processes for one each, having found no GPU
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # --dtype says it, and autocast is where the loss is computed
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # the proofs need a whole base on each rank, once
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes != ranks.world_size():
        raise Failed(f"{ranks.world_size()} processes were launched, and {state.num_processes} found one another")


def is_sharded() -> bool:
    """Whether accelerate will shard the model over the group."""
    return ranks.is_launched() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def checkpoints_itself() -> bool:
    """Whether accelerate, told so by its configuration, has activations computed again for the backward pass."""
    return is_sharded() and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"


def keeps_parts() -> bool:
    """Whether a process may hold only parts of the new adapter, or copies that its optimizer works on instead."""
    return is_sharded() or (ranks.is_launched() and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true")


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The body runs on rank 0, and on the others when that is done: caches are made once."""
    if ranks.world_size() == 1:
        yield
        return
    with PartialState().main_process_first():
        yield


def wait() -> None:
    """Go on when all of the group are here."""
    if ranks.world_size() > 1:
        PartialState().wait_for_everyone()


def numbers_of_each(numbers: list[float], device: torch.device) -> Tensor:
    """Some numbers of each process as rows, (processes, N), in float64; every process gets them all."""
    own = torch.tensor([numbers], dtype=torch.float64, device=exact_device(device))
    rows: Tensor = gather(own) if ranks.world_size() > 1 else own
    return rows


def share_of(count: int) -> tuple[list[int], int]:
    """This process's share of so many, by number, and how many of these are really its own: the last only fills up.

    With FSDP every forward pass is one of all processes together, so that there are as many in each.
    """
    processes = ranks.world_size()
    places = [ranks.rank() + processes * turn for turn in range(-(-count // processes))]
    return [place % count for place in places], sum(place < count for place in places)


def told_by_each(value: T | None) -> list[T]:
    """What each process has to tell, in the order of ranks, without those that have nothing; all have to ask."""
    everyone: list[T | None] = gather_object([value]) if ranks.world_size() > 1 else [value]
    return [told for told in everyone if told is not None]


class WholeSteps(Sampler[int]):
    """The order of one process, in which every step has the same number of micro-batches on each rank.

    accelerate deals whole micro-batches to the ranks in turn, and would fill the last step up by repeating records.
    Here places are filled up with the number ``size``, which means nothing: an epoch sees each record once.
    """

    def __init__(self, size: int, places: int, seed: int) -> None:
        """``size``: records; ``places``: records of one micro-batch of all ranks together."""
        self._order = SeedableRandomSampler(range(size), data_seed=seed)
        self._size = size
        self._missing = -size % places

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from [self._size] * self._missing

    def __len__(self) -> int:
        return self._size + self._missing


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter as one tensor, gathered if it is sharded; then every rank has to ask."""
    if not is_sharded():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, value: Tensor) -> Any:
    """``value``, sharded as ``tensor`` is."""
    here = value.to(tensor.device)
    if not is_sharded():
        return here
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(here, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else here
