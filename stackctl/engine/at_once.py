"""Computations that run at once on a CPU, each from its beginning to its end on threads of its own.

An operator that all threads share ends when the last of them is done, thousands of times in a step, and while one
thread prepares the next operator the others wait. What needs nothing of one another, as the parts of a micro-batch,
is therefore better computed at once than one after another. Decision 51 has the figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import nn

from stackctl.engine.base.configuration import positions_change
from stackctl.engine.noise import OwnDropout, draw_seeds, drawn_from
from stackctl.machine import openmp
from stackctl.machine.resources import one_heap

T = TypeVar("T")
R = TypeVar("R")
_MOST = 2
"""Computations at once where there are threads for them: more would read all weights as often at once."""
_OWN_CODE = ("torch", "transformers", "peft")
"""Whose modules may be called by several threads, if it is seen that they keep nothing."""


def computations_at_once() -> int:
    """How many computations the threads that torch has are dealt to."""
    threads = torch.get_num_threads()
    return threads if threads <= _MOST + 1 else _MOST


class AtOnce:
    """``count`` computations at a time, each on its share of the threads. Results do not depend on which is done first.

    What one thread computes is computed with as many threads for torch whoever else is at work, and so has the same
    bits.
    """

    def __init__(self, count: int, *, noise: bool = False) -> None:
        """With ``noise`` each draws its own in training, by a seed that whoever asks draws for it."""
        one_heap()
        self.count, self._noise = count, noise
        whole = torch.get_num_threads()
        self._at_work: set[int] = set()
        self._share = max(1, whole // count)
        self._pool = ThreadPoolExecutor(count, "part", initializer=self._begin, initargs=(threading.Barrier(count),))
        wait([self._pool.submit(int) for _ in range(count)])
        torch.set_num_threads(whole)

    def _begin(self, all_are_here: threading.Barrier) -> None:
        """A thread takes the number that was set last when it first asks for it, so that all ask before it changes."""
        torch.set_num_threads(self._share)
        torch.get_num_threads()
        all_are_here.wait()

    def map(
        self, function: Callable[[T], R], items: Sequence[T], alone: Callable[[T], bool] = lambda _: False
    ) -> Iterator[R]:
        """What ``function`` makes of each item, in their order; begun in that order, too.

        It is computed as whoever asks would: with or without gradients, and in the precision of autocast. The first
        items may stand ``alone``: each of them has all threads, as has a last one that nothing is left beside.

        One that fails, or a signal, ends all of them.
        """
        first = list(itertools.takewhile(alone, items))
        others = items[len(first) :]
        if len(others) < 2:
            first, others = [*first, *others], []
        yield from map(function, first)
        if not others:
            return
        openmp.give_up_pool()
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        draws = self._noise and torch.is_grad_enabled()  # what is only looked at leaves torch's generator as it is
        seeds: Sequence[int | None] = draw_seeds(len(others)) if draws else [None] * len(others)
        futures = [
            self._pool.submit(self._run, function, item, seed, modes) for item, seed in zip(others, seeds, strict=True)
        ]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            self._end(futures)
            raise

    def _run(self, function: Callable[[T], R], item: T, seed: int | None, modes: tuple[bool, bool, torch.dtype]) -> R:
        gradients, autocast, dtype = modes
        self._at_work.add(threading.get_ident())
        try:
            with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype, enabled=autocast), drawn_from(seed):
                return function(item)
        finally:
            self._at_work.discard(threading.get_ident())
            if self._share > 1:
                openmp.give_up_pool()

    def _end(self, futures: Sequence[Future[R]]) -> None:
        """Let nothing of it go on: a computation ends at its next operator."""
        for future in futures:
            future.cancel()
        running = [future for future in futures if not future.done()]
        while running:
            for thread in list(self._at_work):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Ended))
            running = list(wait(running, timeout=1).not_done)

    def close(self) -> None:
        self._pool.shutdown()


class _Ended(BaseException):
    """Raised in a computation that is not wanted any more."""


def keeps_nothing(model: nn.Module, compute: Callable[[], object]) -> bool:
    """Whether a model may compute for several threads at once, by what ``compute`` leaves behind in its modules.

    ``compute`` is run twice: what a module makes in its first call, it may keep.
    """
    modules = list(model.modules())
    if any(not isinstance(m, OwnDropout) and type(m).__module__.partition(".")[0] not in _OWN_CODE for m in modules):
        return False
    if positions_change(model) or any(hasattr(module, "make_weights") for module in modules):  # a table that grows
        return False
    compute()
    before = _held(modules)
    compute()
    after = _held(modules)
    return len(before) == len(after) and all(
        one is other and version == now for (one, version), (other, now) in zip(before, after, strict=True)
    )


def _held(modules: Sequence[nn.Module]) -> list[tuple[object, int | None]]:
    """Everything that modules hold, and how often each tensor among it has been written."""
    held: list[object] = []
    for module in modules:
        for value in (*vars(module).values(), *module.buffers(recurse=False), *module.parameters(recurse=False)):
            held += [value, *(value if isinstance(value, list | tuple) else ()), *(_values(value))]
    return [(value, _version(value)) for value in held]


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else []


def _version(value: object) -> int | None:
    if not isinstance(value, torch.Tensor):
        return None
    with contextlib.suppress(RuntimeError):  # one of inference keeps no count
        return value._version
    return None
