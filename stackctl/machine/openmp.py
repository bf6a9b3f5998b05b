"""How OpenMP's threads wait for one another: spinning on an idle machine, asleep on a busy one.

A step of a small model has thousands of barriers. Threads that spin there are quick while every one of them has a core,
and a disaster where another program holds one: the spinning takes the very time that the late thread needs. Decision
15 has the figures. libgomp, which torch brings on Linux, reads how long to spin when it is loaded (``GOMP_SPINCOUNT``),
but spins hardly at all while more threads are in its pools than there are processors (``gomp_throttled_spin_count_var``
in gcc's ``libgomp/env.c`` and ``config/linux/wait.h``). So a pool that only sleeps is made where cores are taken, and
given up where they are idle again. The number of threads that work never changes, and so no result does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from stackctl.machine.resources import allowed_cores, cores, physical_cores

_SPINS = "30001"
"""Some 0.3 ms: longer than a barrier waits for a thread that has a core. A number that nobody types."""
_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SOFT = 1
"""``omp_pause_soft``: what threads hold of their own stays."""
_EVERY = 1.0
"""Seconds between two looks."""
_TAKEN, _IDLE = 0.3, 0.15
"""From how much of a core that the threads need and others use threads sleep, and up to how much they spin again."""


def set_waiting(environment: MutableMapping[str, str]) -> int:
    """Set how threads wait, before torch is loaded; the threads to watch the machine for from then on, or 0.

    What somebody has set stands. No more threads work than a container has processors.
    """
    if cores() < len(allowed_cores()):
        environment.setdefault("OMP_NUM_THREADS", str(cores()))
    if any(environment.get(name) not in (None, _SPINS) for name in _BY_USER):  # our own comes from a parent process
        return 0
    if sys.platform != "linux":  # another OpenMP, which takes no word of it later
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        return 0
    environment["GOMP_SPINCOUNT"] = _SPINS
    threads = _asked_threads(environment) or cores()
    return threads if threads > 1 else 0


def computing_threads(environment: Mapping[str, str]) -> int:
    """How many threads compute: as many as somebody has set, else one for each core, however many it runs at once."""
    return _asked_threads(environment) or min(cores(), physical_cores())


def _asked_threads(environment: Mapping[str, str]) -> int:
    """As many as somebody has set, of the outermost level; 0 where nobody has."""
    asked = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdecimal() else 0


@contextlib.contextmanager
def sleeping(environment: MutableMapping[str, str]) -> Iterator[None]:
    """While the body loads or starts another program, its threads are told to wait asleep: nobody watches them.

    What somebody has set stands.
    """
    ours = environment.get("GOMP_SPINCOUNT") == _SPINS
    if ours:
        del environment["GOMP_SPINCOUNT"]
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        if ours:
            del environment["OMP_WAIT_POLICY"]
            environment["GOMP_SPINCOUNT"] = _SPINS


def watch(threads: int, make_pool: Callable[[], None], computes: Callable[[], bool] = lambda: True) -> None:
    """Look at the machine every second, from now to the end of the process, and let threads wait as it allows.

    ``threads`` are those that work. ``make_pool`` runs something in parallel, which gives the thread that calls it a
    pool of its own; it is called first when a look has found a core taken. Before it ``computes`` there is nothing to
    look after.
    """
    threading.Thread(target=_watch, args=(threads, make_pool, computes), name="stackctl-openmp", daemon=True).start()


def _watch(threads: int, make_pool: Callable[[], None], computes: Callable[[], bool]) -> None:
    given_up: threading.Event | None = None
    seen = Seconds.now()
    while True:
        time.sleep(_EVERY)
        before, seen = seen, Seconds.now()
        missing = missing_cores(before, seen, threads)
        if given_up is None and missing > _TAKEN and computes():
            given_up = threading.Event()
            threading.Thread(target=_sleep, args=(make_pool, given_up), name="stackctl-pool", daemon=True).start()
        elif given_up is not None and missing < _IDLE:
            given_up.set()
            given_up = None


def _sleep(make_pool: Callable[[], None], given_up: threading.Event) -> None:
    make_pool()
    given_up.wait()  # the pool ends with the thread


def give_up_pool() -> None:
    """End the pool of the thread that calls, which is about to leave the computing to another: threads of two pools are
    more than there are processors, and would never spin. It has a new one as soon as it computes again."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another OpenMP, or one that is too old
            loaded = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            loaded.omp_pause_resource_all(_SOFT)


@dataclass(frozen=True)
class Seconds:
    """Of the clock, of all processors' work, and of this process's, up to one moment."""

    clock: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> Seconds:
        import psutil  # type: ignore[import-untyped]

        times = psutil.cpu_times(percpu=True)
        mine = [times[core] for core in allowed_cores() if core < len(times)] or times
        busy = sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) - getattr(core, "guest", 0.0) for core in mine)
        own = os.times()
        return cls(time.monotonic(), busy, own.user + own.system)


def missing_cores(before: Seconds, after: Seconds, threads: int) -> float:
    """How many of the cores that ``threads`` need were in use by other processes between two moments."""
    passed = max(after.clock - before.clock, 1e-3)
    others = max((after.machine - before.machine) - (after.own - before.own), 0.0) / passed
    return others + threads - cores()
