"""Thousands of hostile requests to one server, which has to answer as before and not to grow."""

from __future__ import annotations

from hostile_requests import assail
from serving import serving
from tiny import TinyModels, random_adapter

from .killing import run_engine
from .runner import Budget, Outcome

_AT_ONCE = 1000


def requests(budget: Budget) -> Outcome:
    base = TinyModels(budget.folder / "models")("llama")
    random_adapter(base, budget.folder / "style", seed=1)
    for arguments in (["init"], ["base", "add", "tiny", str(base)], ["add", "style", "style"]):
        ended = run_engine(arguments, budget.folder)
        assert ended.code == 0, ended.said
    sent = 0
    failures: list[str] = []
    with serving(budget.folder) as server:
        while not failures and (not sent or budget.is_left):
            try:
                sent += sum(assail(server, _AT_ONCE, budget.random).values())
            except AssertionError as error:
                failures.append(f"after {sent} requests: {error}")
        if (code := server.stop()) != 0:
            failures.append(f"it ended with {code}")
    return Outcome(f"{sent} hostile requests", failures)
