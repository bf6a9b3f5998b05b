"""huggingface_hub's HTTP client, made impatient.

By itself it waits for ever for a silent server, and sleeps as long as a 429 asks.
"""

from __future__ import annotations

from typing import Any

from stackctl.core import Say
from stackctl.core.environment import seconds_setting
from stackctl.core.errors import HubFailure
from stackctl.hub.hub_errors import Attempt, explain_status, retry_after

TIMEOUT_SECONDS = seconds_setting("STACKCTL_HUB_TIMEOUT")
"""How long a server may be silent."""
_PATIENCE_SECONDS = 30
_MOST_FAILURES = 10
"""How long all waits that a server asks for may be together, and how often one request may fail; then it is told."""


def plain_client(hooks: Any) -> Any:
    """A client as huggingface_hub makes it."""
    import httpx2

    return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)


def impatient_client(attempt: Attempt, say: Say, hooks: Any) -> Any:
    """huggingface_hub's client, which gives up on a silent server and on one that asks for too much patience."""
    import httpx2

    patience = _Patience(attempt, say)

    class ImpatientClient(httpx2.Client):
        def send(self, request: Any, **options: Any) -> Any:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_SECONDS)
            try:
                response = super().send(request, **options)
            except httpx2.TimeoutException as error:
                raise HubFailure(
                    f"{attempt.host} was silent for {TIMEOUT_SECONDS:.0f} s",
                    hint=f"try again (STACKCTL_HUB_TIMEOUT sets the seconds to wait): {attempt.again}",
                ) from error
            except httpx2.TransportError:
                patience.count_break(f"{request.method} {request.url}")
                raise
            if response.status_code in (408, 409, 429) or response.status_code >= 500:
                patience.count(f"{request.method} {request.url}", response)
            return response

    return ImpatientClient(event_hooks=hooks, follow_redirects=True, timeout=None)


class _Patience:
    """How often a server has failed and how long it has asked to wait; huggingface_hub itself has no limit to that."""

    def __init__(self, attempt: Attempt, say: Say) -> None:
        self._attempt = attempt
        self._say = say
        self._failures: dict[tuple[str, int], int] = {}
        self._waited = 0

    def count(self, request: str, response: Any) -> None:
        """Take note of a failed response.

        Raises:
            HubFailure: it is one too many.
        """
        from huggingface_hub.errors import HfHubHTTPError

        status = response.status_code
        asked = retry_after(response.headers) or 0
        times = self._failures[request, status] = self._failures.get((request, status), 0) + 1
        self._waited += asked
        if self._waited > _PATIENCE_SECONDS or times > _MOST_FAILURES:
            raise explain_status(HfHubHTTPError("", response=response), self._attempt)
        if asked:
            self._say(f"{self._attempt.host} asks to wait {asked} s")
        elif times == 2:  # the first may be the last: not everything is tried again
            self._say(f"{self._attempt.host} answers HTTP {status}: trying again")

    def count_break(self, request: str) -> None:
        """Take note of a connection that broke."""
        times = self._failures[request, 0] = self._failures.get((request, 0), 0) + 1
        if times == 2:
            self._say(f"the connection to {self._attempt.host} breaks: trying again")
