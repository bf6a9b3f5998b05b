"""Threads spin where every one of them has a core, and sleep where another program holds one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from stackctl.machine import openmp


@pytest.mark.parametrize(
    ("given", "expected", "threads"),
    [
        ({}, {"GOMP_SPINCOUNT": "30001"}, 4),
        ({"OMP_NUM_THREADS": "3,2"}, {"OMP_NUM_THREADS": "3,2", "GOMP_SPINCOUNT": "30001"}, 3),
        ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "30001"}, 0),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}, 0),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}, 0),
        ({"GOMP_SPINCOUNT": "30001"}, {"GOMP_SPINCOUNT": "30001"}, 4),  # a process of ours started this one
    ],
)
def test_what_somebody_has_set_stands(monkeypatch, given, expected, threads):
    monkeypatch.setattr(openmp, "cores", lambda: 4)
    monkeypatch.setattr(openmp, "allowed_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(sys, "platform", "linux")
    assert openmp.set_waiting(given) == threads
    assert given == expected


def test_no_more_threads_than_a_container_has_processors(monkeypatch):
    monkeypatch.setattr(openmp, "cores", lambda: 2)
    monkeypatch.setattr(openmp, "allowed_cores", lambda: list(range(64)))
    monkeypatch.setattr(sys, "platform", "linux")
    environment = dict[str, str]()
    assert openmp.set_waiting(environment) == 2
    assert environment["OMP_NUM_THREADS"] == "2"


def test_another_openmp_sleeps(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    environment = dict[str, str]()
    assert openmp.set_waiting(environment) == 0
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("machine", "own", "threads", "missing"),
    [
        (4.0, 4.0, 2, 0.0),  # this process alone, on both cores, for two seconds
        (2.0, 2.0, 2, 0.0),
        (4.0, 2.0, 2, 1.0),  # another one beside it
        (4.0, 2.0, 1, 0.0),  # which takes nothing that one thread needs
        (0.0, 0.1, 2, 0.0),  # the two clocks do not tick alike
    ],
)
def test_the_cores_that_others_use(monkeypatch, machine, own, threads, missing):
    monkeypatch.setattr(openmp, "cores", lambda: 2)
    found = openmp.missing_cores(openmp.Seconds(10, 5, 1), openmp.Seconds(12, 5 + machine, 1 + own), threads)
    assert found == pytest.approx(missing)


def test_the_clocks_run():
    before = openmp.Seconds.now()
    sum(range(10**6))
    after = openmp.Seconds.now()
    assert after.clock > before.clock
    assert after.machine >= before.machine
    assert after.own >= before.own


def test_a_pool_is_made_where_a_core_is_taken_and_given_up_where_it_is_free(monkeypatch):
    """One pool, however long the core is taken; between the two bounds nothing changes."""
    seen = iter([0.0, 0.2, 0.9, 0.9, 0.2, 0.0, 0.0, 0.5])
    made, reached = [], threading.Event()

    def look(*_: object) -> float:
        found = next(seen, None)
        if found is None:
            reached.set()
            threading.Event().wait()  # the watching thread ends with the process
        return found

    monkeypatch.setattr(openmp, "_EVERY", 0.01)
    monkeypatch.setattr(openmp, "missing_cores", look)
    before = set(threading.enumerate())
    openmp.watch(2, lambda: made.append(threading.current_thread()))
    assert reached.wait(30)
    until = time.monotonic() + 30
    while len(made) < 2 and time.monotonic() < until:  # a thread tells of itself once it runs
        time.sleep(0.01)
    for thread in made[:1]:
        thread.join(30)
    alive = [t for t in set(threading.enumerate()) - before if t.name == "stackctl-pool"]
    assert len(made) == 2
    assert alive == [made[1]]


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, "30001 None"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE")]
)
def test_it_is_set_before_torch_is_loaded(environment, expected):
    code = (
        "import os, sys, stackctl.engine\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    assert done.stdout.strip() == expected
