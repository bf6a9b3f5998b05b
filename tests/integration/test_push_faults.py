"""Push when something fails: the Hub says no, the connection breaks, the command is killed. Nothing is half there."""

from __future__ import annotations

import itertools
import random
import shlex
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, ended_at, git_oid
from stress.killing import run_command

from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry

ID = ("--base-id", "acme/tiny")
CHECKPOINT = {"README.md", "adapter.yaml", "adapter_config.json", "adapter_info.json", "adapter_model.safetensors"}
COMMIT = "POST /api/models/me/style/commit"
STATUSES = [401, 403, 409, 412, 429, 500, 504]
STEPS = ["GET /api/models/me/style", "validate-yaml", "preupload", "objects/batch", "PUT /lfs"]


def check_told(ran: Any, hub: HubServer) -> dict[str, str]:
    """One error of two lines, with the next command, without the token."""
    error: dict[str, str] = ran.json["error"]
    lines = ran.err.splitlines()
    assert [line.partition(" ")[0] for line in lines if line.startswith(("error:", "hint:"))] == ["error:", "hint:"]
    assert "\n" not in error["message"] and "stackctl push style me/style" in error["hint"]
    assert hub.token not in ran.out + ran.err and "Traceback" not in ran.err
    return error


@pytest.mark.parametrize(
    ("match", "status"),
    [
        *(("commit", status) for status in STATUSES),
        *((step, status) for step in STEPS for status in (403, 503)),
        ("repos/create", 409),
        ("GET /api/models/me/style/tree", 429),
    ],
)
def test_every_status_at_every_step_is_exit_6_and_the_retry_works(
    run: Callable[..., Any], here: Registry, hub: HubServer, match: str, status: int
) -> None:
    if match != "repos/create":
        hub.repo("me/style")
    hub.fail(match, status, body={"error": f"no, {hub.token}"})
    check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert (
        all(len(repo.commits) == 1 for repo in hub.repos.values())
        and here.find_adapter("style").newest().pushed is None
    )  # type: ignore[union-attr]
    hub.heal()
    run("push", "style", "me/style", *ID)
    repo = hub.repos["me/style"]
    assert len(repo.commits) == 2 and set(repo.files) == CHECKPOINT | {".gitattributes"}


@pytest.mark.parametrize("match", ["GET /api/models/me/style", "preupload", "objects/batch", "PUT /lfs", "commit"])
def test_a_connection_that_is_cut_is_exit_6(
    run: Callable[..., Any], here: Registry, hub: HubServer, match: str
) -> None:
    hub.repo("me/style")
    hub.fail(match, cut=True)
    error = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert "broke" in error["message"]


def test_the_retry_sends_only_what_is_left(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    hub.fail(COMMIT, 503)
    run("push", "style", "me/style", *ID, code=6)
    assert len(hub.requests("PUT /lfs/")) == 1
    hub.heal()
    run("push", "style", "me/style", *ID)
    assert len(hub.requests("PUT /lfs/")) == 1  # the weights were there


def test_a_short_trouble_is_waited_out(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    hub.fail("preupload", 503, times=2)
    hub.fail("objects/batch", 429, headers={"Retry-After": "3"}, times=1)
    hub.fail("PUT /lfs", cut=True, times=1)
    ran = run("push", "style", "me/style", *ID)
    assert (
        hub.slept == [1, 2, 4, 1] and "asks to wait 3 s" in ran.err
    )  # Retry-After and a second; twice as long each time


def test_a_long_wait_is_told_and_not_slept(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    hub.fail("preupload", 429, headers={"Retry-After": "3600"})
    error = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert "in 3600 s" in error["hint"] and hub.slept == []
    hub.heal()
    hub.fail("preupload", 429, headers={"RateLimit": '"api";r=0;t=77'})
    assert "in 77 s" in check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)["hint"]


def test_somebody_else_pushes_meanwhile(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    repo = hub.repo("me/style")
    hub.fail("preupload", call=lambda: repo.commit({**repo.files, "theirs.md": b"x"}, "theirs"), times=1)
    error = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert "somebody else" in error["message"] and repo.messages == ["initial commit", "theirs"]
    run("push", "style", "me/style", *ID)
    assert repo.files["theirs.md"] == b"x" and len(repo.commits) == 3


def test_a_silent_server_is_given_up(
    run: Callable[..., Any], here: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stackctl.hub.http_client

    monkeypatch.setattr(stackctl.hub.http_client, "TIMEOUT_SECONDS", 0.3)
    hub.repo("me/style")
    for match in ("GET /api/models/me/style", "PUT /lfs", "commit"):
        hub.fail(match, delay=30.0, times=1)
        assert "silent" in check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)["message"]
        hub.heal()
    monkeypatch.setattr(stackctl.hub.http_client, "TIMEOUT_SECONDS", 5)
    hub.fail("", delay=0.05)
    run("push", "style", "me/style", *ID)  # slow is not silent


def test_no_token_offline_and_nobody_there(
    run: Callable[..., Any], here: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    error = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert "hf auth login" in error["hint"] and not hub.requests("me/style")
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherTokenWhichIsNoGood")
    hub.repo("me/style")
    ran = run("push", "style", "me/style", *ID, "--json", code=6)
    assert "hf auth login" in check_told(ran, hub)["hint"] and "hf_Another" not in ran.out + ran.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        "HF_HUB_OFFLINE=0 stackctl push"
        in check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)["hint"]
    )
    monkeypatch.delenv("HF_TOKEN")
    both = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert "offline mode" in both["message"] and "no token" in both["message"] and "hf auth login" in both["hint"]
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)["message"]


def test_a_token_that_is_none_and_an_empty_address_are_told_as_that(
    run: Callable[..., Any], here: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_\u00e9")
    told = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert (
        "other characters than ASCII" in told["message"]
        and "hf auth login" in told["hint"]
        and not hub.requests("me/style")
    )
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "ENDPOINT", "")
    told = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert told["message"].startswith("HF_ENDPOINT, which is empty, cannot be reached")


def test_the_hub_has_other_bytes_afterwards(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    repo = hub.repo("me/style")

    def spoil() -> None:
        repo.commits[repo.head] = {**repo.files, "adapter_config.json": b"{}"}

    hub.fail("GET /api/models/me/style/tree", times=1)
    hub.fail("GET /api/models/me/style/tree", call=spoil, times=1)
    error = check_told(run("push", "style", "me/style", *ID, "--json", code=5), hub)
    assert "adapter_config.json" in error["message"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_storage_says_nothing_of_the_repo_or_the_token(
    run: Callable[..., Any], here: Registry, hub: HubServer, status: int
) -> None:
    hub.fail("PUT /lfs/", status)
    told = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)["message"]
    assert f"the storage of {hub.url} refused a file of me/style with HTTP {status}" in told


@pytest.mark.parametrize("status", [403, 409, 412, 422])
def test_a_tag_that_cannot_be_made_is_told_as_that(
    run: Callable[..., Any], here: Registry, hub: HubServer, status: int
) -> None:
    """The commit is there by then, and a conflict need not be one with a tag of that name."""
    hub.fail("/tag/", status)
    told = check_told(run("push", "style", "me/style", *ID, "--tag", "v1", "--json", code=6), hub)["message"]
    assert told.startswith("the files are pushed, but without the tag 'v1'") and "revision" not in told
    hub.heal()
    assert run("push", "style", "me/style", *ID, "--tag", "v1", "--json").json["outcome"] == "unchanged"
    assert hub.repos["me/style"].refs["v1"] == hub.repos["me/style"].head


def test_the_token_is_nowhere(
    run: Callable[..., Any], here: Registry, hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fail(COMMIT, 403, body={"error": f"Bearer {hub.token} may not", "message": hub.token}, times=1)
    debugged = run("push", "style", "me/style", *ID, "--debug", code=6)
    assert "Traceback" in debugged.err
    assert "may not write" in debugged.err
    assert hub.token not in debugged.err
    run("push", "style", "me/style", *ID)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "hf" not in path.parts]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()]
    assert not [path for path, data in hub.repos["me/style"].files.items() if hub.token.encode() in data]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz is wrong", "*** is wrong"),
        ("http://me:pass@host/x", "http://host/x"),
        ("the token may not write", "the token may not write"),
    ],
)
def test_secrets_of_others_are_taken_out_too(text: str, clean: str) -> None:
    from stackctl.hub.hub_errors import scrub

    assert scrub(text) == clean


def test_the_server_of_these_tests_names_files_as_git_does() -> None:
    assert git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_the_hint_repeats_all_that_was_typed(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    words = ["push", "style", "me/style", *ID, "--license", "mit", "--language", "en", "--language", "de"]
    words += ["--dataset", "me/data-v1.5", "-m", "it's new", "--tag", "v1", "--private"]
    hub.fail(COMMIT, 503, times=99)
    hint = run(*words, code=6).err.splitlines()[-1]
    assert shlex.join(["stackctl", *words]) in hint


# -- what the Hub did although its answer was lost ------------------------------------------------------------------

LOST = [{"cut": True}, {"status": 504}]


@pytest.mark.parametrize("answer", LOST, ids=["cut", "504"])
@pytest.mark.parametrize("match", ["repos/create", "PUT /lfs/", COMMIT, "/tag/"])
def test_what_was_done_without_an_answer_is_not_done_again(
    run: Callable[..., Any], here: Registry, hub: HubServer, match: str, answer: dict[str, Any]
) -> None:
    words = ("push", "style", "me/style", *ID, "--tag", "v1", "--json")
    hub.fail(match, done=True, **answer)
    check_told(run(*words, code=6), hub)
    hub.heal()
    said = run(*words).json
    repo = hub.repos["me/style"]
    assert said["outcome"] == ("unchanged" if match in (COMMIT, "/tag/") else "pushed")
    assert len(repo.commits) == 2 and repo.refs["v1"] == repo.head == said["commit"]
    assert here.find_adapter("style").newest().pushed.commit == repo.head  # type: ignore[union-attr]


@pytest.mark.parametrize("answer", [*LOST, {"status": 403}], ids=["cut", "504", "403"])
def test_a_pull_request_that_may_be_there_is_looked_for_before_another_is_opened(
    run: Callable[..., Any], here: Registry, hub: HubServer, answer: dict[str, Any]
) -> None:
    repo = hub.repo("me/style")
    may_be = answer.get("status") != 403
    hub.fail(COMMIT, done=may_be, **answer)
    hint = check_told(run("push", "style", "me/style", *ID, "--create-pr", "--json", code=6), hub)["hint"]
    assert ("me/style/discussions" in hint) == may_be == ("refs/pr/1" in repo.refs)


@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 404}, {"status": 503}, {"cut": True}])
def test_what_cannot_be_looked_at_afterwards_is_pushed_all_the_same(
    run: Callable[..., Any], here: Registry, hub: HubServer, fault: dict[str, Any]
) -> None:
    hub.repo("me/style")
    hub.fail("/tree/", times=1)
    hub.fail("/tree/", **fault)
    error = check_told(run("push", "style", "me/style", *ID, "--json", code=6), hub)
    assert f"commit {hub.repos['me/style'].head[:12]} is made" in error["message"]
    hub.heal()
    assert run("push", "style", "me/style", *ID, "--json").json["outcome"] == "unchanged"


# -- killed ---------------------------------------------------------------------------------------------------------


ENDS = {signal.SIGKILL: None, signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_one_that_is_ended_at_any_request_leaves_nothing_half_done(
    here: Registry, hub: HubServer, number: signal.Signals
) -> None:
    words, folder = ["push", "style", "me/style", *ID], here.root.parent
    entry = (here.root / "adapters" / "style.yaml").read_text()
    steps = list(itertools.product(range(1, 11), (False, True)))
    for request, answered in random.Random(1).sample(steps, 10 if number is signal.SIGKILL else 5):
        hub.repos.clear()
        hub.lfs.clear()
        (here.root / "adapters" / "style.yaml").write_text(entry)
        prepare = ended_at(request, number, answered=answered)
        ended = run_command(words, folder, prepare=prepare)
        assert ended.code == ENDS[number], ended.said
        assert verify_registry(here)[1] == []
        again = run_command(words, folder, prepare=lambda folder: setattr(tempfile, "tempdir", str(folder)))
        assert again.code == 0, again.said
        repo = hub.repos["me/style"]
        assert len(repo.commits) == 2 and set(repo.files) == CHECKPOINT | {".gitattributes"}
        assert here.find_adapter("style").newest().pushed.commit == repo.head  # type: ignore[union-attr]
        assert not [*folder.glob(".tmp-*")], "what was prepared is removed, by the next one at the latest"
