"""What can go wrong between here and the Hub, as one sentence and the next command.

huggingface_hub wraps its failures: a cut upload is a bare ``RuntimeError``, a 403 on download a
``LocalEntryNotFoundError``. So the whole chain of causes is looked at, and the most telling link decides.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stackctl.core.command_line import CommandLine
from stackctl.core.errors import HubFailure, Incompatible, NotFound, StackctlError, VerificationFailed

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_SECRETS = (
    (re.compile(r"(?i)\b(bearer(?:\s+|%20)|token=)[\w.~+/=-]{8,}"), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "***"),
    (re.compile(r"(?<=://)[^/@\s]+@"), ""),
)
_OF_THE_CLIENT = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What huggingface_hub raises, of an answer of another shape than it expects, too."""
_LONGEST = 300


@dataclass(frozen=True)
class Attempt:
    """What is being tried, so that its failure can be told: ``again`` is the command that tries once more."""

    repo: str
    host: str
    again: CommandLine
    revision: str | None = None
    writes: bool = False


def scrub(text: str) -> str:
    """Text of others without the token, other secrets and the credentials of URLs."""
    for token in _tokens():
        text = text.replace(token, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _tokens() -> list[str]:
    """The tokens in use, without asking the network for a fresh one (as huggingface_hub's ``get_token`` may)."""
    found = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(OSError, ImportError):
        from pathlib import Path

        from huggingface_hub import constants

        found.append(Path(constants.HF_TOKEN_PATH).read_text())
    return [token.strip() for token in found if len(token.strip()) > 3]


@contextlib.contextmanager
def explained(attempt: Attempt) -> Iterator[None]:
    """Turn whatever the client raises inside into the project's errors; nothing of ours belongs in the body.

    Raises:
        NotFound, HubFailure, VerificationFailed: see :func:`explain`.
        Incompatible: the repo has a file that no disk here can hold.
    """
    import httpx2

    try:
        yield
    except StackctlError:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, *_OF_THE_CLIENT) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise Incompatible(
                f"{attempt.repo} has a file of a name that is too long for this disk",
                hint="its owner has to shorten the name; where the whole path is too long, so does a shorter HF_HOME",
            ) from error
        if isinstance(error, OSError) and (error.errno in _DISK or (error.errno and error.filename is not None)):
            raise
        raise explain(error, attempt) from _scrubbed(error)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and everything that led to it, outermost first."""
    links: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in links:
        links.append(current)
        current = current.__cause__ or current.__context__
    return links


def _scrubbed(error: BaseException) -> BaseException:
    """The same error, fit to be shown by ``--debug``: a server may repeat what it was sent."""
    for link in _chain(error):
        link.args = tuple(scrub(value) if isinstance(value, str) else value for value in link.args)
    return error


def explain(error: BaseException, attempt: Attempt) -> StackctlError:
    """An error of the client as one of ours."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def cause(*kinds: type[Any]) -> Any:
        return next((link for link in _chain(error) if isinstance(link, kinds)), None)

    if told := cause(StackctlError, OfflineModeIsEnabled):
        return told if isinstance(told, StackctlError) else offline(attempt)
    if refused := cause(HfHubHTTPError, httpx2.HTTPStatusError):
        return explain_status(refused, attempt)
    if broken := cause(httpx2.TransportError):
        return _explain_network(broken, attempt)
    if cause(UnicodeEncodeError):  # in the headers of a request, of which only the token is somebody's
        return HubFailure(
            f"the token to {attempt.host} is none: it holds other characters than ASCII",
            hint=f"hf auth login (or correct HF_TOKEN), then: {attempt.again}",
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return VerificationFailed(
            f"what arrived from {attempt.repo} is not as long as the Hub says", hint=f"try again: {attempt.again}"
        )
    said = _first_line(str(error)) or type(error).__name__
    return HubFailure(
        f"{attempt.host} gave an answer that huggingface_hub cannot use: {said}",
        hint=f"try again: {attempt.again}; if HF_ENDPOINT is set, check that it speaks the Hub's protocol",
    )


def may_be_done(error: BaseException) -> bool:
    """Whether what was asked for may have been done all the same: only its answer is missing."""
    import httpx2

    return any(
        (isinstance(link, httpx2.TransportError) and not isinstance(link, httpx2.ConnectError | httpx2.ConnectTimeout))
        or getattr(getattr(link, "response", None), "status_code", 0) >= 500
        for link in _chain(error)
    )


def offline(attempt: Attempt) -> HubFailure:
    """huggingface_hub was told not to go out."""
    return HubFailure(
        f"huggingface_hub is in offline mode, so {attempt.repo} cannot be reached",
        hint=f"HF_HUB_OFFLINE=0 {attempt.again}",
    )


def _explain_network(error: Any, attempt: Attempt) -> StackctlError:
    import httpx2

    if isinstance(error, httpx2.ProxyError):
        what = f"the proxy would not lead to {attempt.host}"
        return HubFailure(what, hint=f"check HTTPS_PROXY, then: {attempt.again}")
    if isinstance(error, httpx2.TimeoutException):
        return HubFailure(f"{attempt.host} did not answer in time", hint=f"try again: {attempt.again}")
    if isinstance(error, httpx2.ConnectError | httpx2.UnsupportedProtocol):
        return HubFailure(
            f"{attempt.host} cannot be reached ({_first_line(str(error)) or 'no connection'})",
            hint=f"check the network (and HF_ENDPOINT), then: {attempt.again}",
        )
    return HubFailure(
        f"the connection to {attempt.host} broke before the {'push' if attempt.writes else 'pull'} was done",
        hint=f"try again, only what is missing is sent: {attempt.again}",
    )


def explain_status(error: Any, attempt: Attempt) -> StackctlError:
    """An HTTP status (and the Hub's own error code) as an error; ``error`` is an ``HfHubHTTPError``, or httpx's own."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, repo, host, again = error.response.status_code, attempt.repo, attempt.host, attempt.again
    said = _first_line(getattr(error, "server_message", None) or "")
    because = f" ({said})" if said else ""
    if isinstance(error, RevisionNotFoundError):
        revision = attempt.revision or "main"
        make = f"hf repo branch create {repo} {revision}" if attempt.writes else f"see {host}/{repo}/tree/main"
        return NotFound(f"{repo} has no revision '{revision}'", hint=make)
    if isinstance(error, EntryNotFoundError):
        return NotFound(f"a file of {repo} is not there any more{because}", hint=f"try again: {again}")
    if isinstance(error, GatedRepoError):
        return HubFailure(f"{repo} is gated", hint=f"ask for access at {host}/{repo}, then: {again}")
    if error.response.request.method == "PUT" and status in (401, 403, 404):  # to an address that the Hub signed
        return HubFailure(
            f"the storage of {host} refused a file of {repo} with HTTP {status}{because}", hint=f"try again: {again}"
        )
    missing = isinstance(error, RepositoryNotFoundError) and not (attempt.writes and status in (401, 403))
    if missing or status == 404:
        return NotFound(
            f"there is no repo '{repo}' at {host}, or it is private and you have no access",
            hint="check the name; for a private repo: hf auth login",
        )
    if status == 401 and "authorization" not in error.response.request.headers:
        return HubFailure(f"{host} wants you to log in for {repo}", hint=f"hf auth login, then: {again}")
    if status == 401:
        return HubFailure(f"{host} does not accept the token{because}", hint=f"hf auth login, then: {again}")
    if status == 403:
        what = "write to" if attempt.writes else "read"
        return HubFailure(
            f"the token may not {what} {repo}{because}",
            hint=f"hf auth login with a token that may {what} it, then: {again}",
        )
    if status == 409:
        return HubFailure(f"{repo} is being changed by somebody else right now{because}", hint=f"try again: {again}")
    if status == 412:
        return HubFailure(
            f"somebody else pushed to {repo} meanwhile, so nothing was committed",
            hint=f"look at {host}/{repo}/commits/{attempt.revision or 'main'}, then: {again}",
        )
    if status == 429:
        seconds = retry_after(error.response.headers)
        when = f"in {seconds} s" if seconds is not None else "in a few minutes"
        return HubFailure(f"{host} received too many requests from you", hint=f"try again {when}: {again}")
    if status >= 500 or status == 408:
        return HubFailure(f"{host} failed on its side (HTTP {status}){because}", hint=f"try again later: {again}")
    return HubFailure(f"{host} refused with HTTP {status}{because}", hint=f"{host}/{repo} may say why; then: {again}")


def retry_after(headers: Any) -> int | None:
    """The seconds that a 429 asks to wait, by ``Retry-After`` or the Hub's own ``RateLimit`` header."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return int(value)
    match = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit") or "")
    return int(match[1]) if match else None


def _first_line(text: str) -> str:
    line = scrub(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    return (line[:_LONGEST] + "…" if len(line) > _LONGEST else line).rstrip(".")
