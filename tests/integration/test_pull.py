"""Pull through the real huggingface_hub from a server on this machine: what comes back, and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FINGERPRINT, make_base, make_registry, plain_repo, register, tree, version
from hub_server import HubServer, ended_at
from msgspec import structs
from stress.killing import run_command

from stackctl.registry.store import Registry, init_registry
from stackctl.registry.verify import verify_registry

ID = ("--base-id", "acme/tiny")


@pytest.fixture
def own_registry(tmp_path: Path) -> Registry:
    """A registry with style@1 and style@2, and instruct@1 that was trained on style@2."""
    registry = make_registry(tmp_path / "registry")
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    register(registry, "instruct", ["style@2:0.5"], seed=3)
    return registry


# -- round trips ----------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_the_same_version(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    (own_registry.root / "weights/style/2/tokenizer.json").write_text('{"a": 1}')
    run("push", "style@2", "me/style", *ID)
    said = run("pull", "me/style", "--registry", other_registry.root, "--json").json
    mine, theirs = version(own_registry, "style@2"), version(other_registry, "style@2")
    head = hub.repos["me/style"].head
    assert (said["adapter"], said["version"], said["digest"], said["commit"]) == ("style", 2, mine.digest, head)
    assert theirs.digest == mine.digest and theirs.created == mine.created and theirs.lora == mine.lora
    assert theirs.hub is not None and (theirs.hub.repo, theirs.hub.commit) == ("me/style", head)
    assert theirs.base == "llama" and theirs.fingerprint == FINGERPRINT
    folder = other_registry.weights_path(theirs)
    assert (folder / "tokenizer.json").read_text() == '{"a": 1}' and not (folder / "README.md").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
    assert verify_registry(other_registry) == (2, [])


def test_a_stack_comes_back_with_its_members_apart(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("compose", "style:0.25+instruct", "--name", "teller")
    run("push", "teller", "me/teller", "--members", *ID)
    ran = run("pull", "me/teller", "--registry", other_registry.root, "-q")
    assert ran.out == "teller\n"
    for label in ("style@2", "instruct@1"):
        assert version(other_registry, label).digest == version(own_registry, label).digest
    assert version(other_registry, "instruct@1").trained_on == ["style@2:0.5"]
    stack = other_registry.find_stack("teller")
    mine = own_registry.find_stack("teller")
    assert stack is not None and mine is not None and stack.members == mine.members
    assert other_registry.settings().current is None  # what is current is for compose and use to say
    assert verify_registry(other_registry) == (4, [])


def test_weights_by_layer_go_up_and_come_back(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("compose", "style:0.25+instruct", "--name", "teller")
    mine = own_registry.find_stack("teller")
    assert mine is not None
    layers = {"model.layers.0": 0.5, "model.layers.1.self_attn.q_proj": -1.0}
    mine = structs.replace(mine, members=[structs.replace(mine.members[0], layer_weights=layers), mine.members[1]])
    own_registry.write(mine)
    run("push", "teller", "me/teller", "--members", *ID)
    assert "layer_weights" in hub.repos["me/teller"].files["README.md"].decode()
    pulled = run("pull", "me/teller", "--registry", other_registry.root, "--json").json
    assert [m.get("layer_weights") for m in pulled["members"]] == [layers, None]
    stack = other_registry.find_stack("teller")
    assert stack is not None and stack.members == mine.members
    again = run("push", "teller", "me/teller", "--members", "--registry", other_registry.root, "--json").json
    assert again["outcome"] == "unchanged"


@pytest.mark.parametrize(
    "method", [["ties", "--density", "0.4"], ["knots_ties", "--density", "0.4"], ["tsv"], ["iso_c"], ["core_ties"]]
)
def test_a_method_goes_up_as_what_it_makes_and_comes_back_as_itself(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer, method: list[str]
) -> None:
    run("compose", "style:0.25+instruct", "--name", "teller", "--method", *method)
    run("push", "teller", "me/teller", "--members", *ID)
    card = hub.repos["me/teller"].files["README.md"].decode()
    assert f"W = W_base + {method[0]}(0.25·ΔW_style + ΔW_instruct)" in card and "exact sum" not in card
    run("pull", "me/teller", "--registry", other_registry.root)
    mine, theirs = own_registry.find_stack("teller"), other_registry.find_stack("teller")
    assert mine is not None and theirs is not None
    assert (theirs.method, theirs.options, theirs.members) == (method[0], mine.options, mine.members)
    again = run("push", "teller", "me/teller", "--members", "--registry", other_registry.root, "--json").json
    assert again["outcome"] == "unchanged"


def test_a_stack_that_becomes_another_is_said_and_what_it_was_can_be_composed_again(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    other = ("--registry", other_registry.root)
    run("compose", "style:0.25+instruct", "--name", "teller")
    run("push", "teller", "me/teller", "--members", *ID)
    run("pull", "me/teller", *other)
    run("compose", "style:0.25+instruct", "--name", "teller", "--method", "ties", "--density", "0.4")
    run("push", "teller", "me/teller", "--members", *ID)
    pulled = run("pull", "me/teller", *other, "--json")
    before = other_registry.find_stack("teller")
    assert pulled.json["added"] == ["teller"] and "note: 'teller' was style@2:0.25+instruct@1 (" in pulled.err
    run("compose", "style:0.25+instruct", "--name", "teller", "--method", "sum")
    run("push", "teller", "me/teller", "--members", *ID)
    back = run("pull", "me/teller", *other).err
    assert "note: 'teller' was style@2:0.25+instruct@1 by ties (to have that back: stackctl compose" in back
    command = back.partition("to have that back: stackctl ")[2].partition(")")[0].replace("NAME", "teller")
    run(*shlex.split(command), *other)
    again = other_registry.find_stack("teller")
    assert before is not None and again is not None and again.members == before.members
    assert (again.method, again.options.density) == ("ties", 0.4)
    assert run("pull", "me/teller", *other, "--json").json["added"] == ["teller"]
    assert run("pull", "me/teller", *other, "--json").json["added"] == []


@pytest.mark.parametrize(
    ("there", "wrong"),
    [("method: sum", "method: of_tomorrow"), ("method: sum", "method: svd"), ("adapter: instruct", "adapter: style")],
)
def test_a_recipe_that_no_registry_could_read_is_not_written_into_one(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer, there: str, wrong: str
) -> None:
    run("push", "style+instruct", "me/teller", "--members", *ID)
    repo = hub.repos["me/teller"]
    assert there.encode() in repo.files["stack.yaml"]
    repo.commit({**repo.files, "stack.yaml": repo.files["stack.yaml"].replace(there.encode(), wrong.encode())})
    before = tree(other_registry)
    said = run("pull", "me/teller", "--registry", other_registry.root, code=4).err
    assert "stack.yaml of me/teller" in said
    assert tree(other_registry) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"peft_type": "LORA", "r": "many"}'])
def test_a_configuration_that_cannot_be_read_is_told_as_the_repos(
    run: Callable[..., Any], other_registry: Registry, hub: HubServer, tmp_path: Path, content: bytes
) -> None:
    hub.repo("me/odd", {**plain_repo(tmp_path), "adapter_config.json": content})
    ran = run("pull", "me/odd", "--registry", other_registry.root, "--json", code=4)
    assert ran.json["error"]["message"].startswith("me/odd: adapter_config.json") and "snapshots" not in ran.err


def test_a_pull_says_all_that_is_wrong_before_it_asks(
    run: Callable[..., Any], other_registry: Registry, hub: HubServer
) -> None:
    words = ["pull", "me/odd", "--name", "../x", "--base", "nobody", "--registry", other_registry.root]
    said = run(*words, code=2).err
    assert "'../x'" in said and "'nobody'" in said and not hub.requests("")


@pytest.mark.parametrize("what", ["style@1", "instruct", "style+instruct", "style@1:-2"])
def test_push_pull_push_makes_no_commit(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer, what: str
) -> None:
    (own_registry.root / "weights/style/1/training_log.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    run("push", what, "me/it", "--members", *ID, "--license", "mit", "--language", "en")
    commits = len(hub.repos["me/it"].commits)
    pulled = run("pull", "me/it", "--registry", other_registry.root, "-q").out.strip()
    said = run("push", pulled, "me/it", "--members", "--registry", other_registry.root, "--json").json
    assert (said["outcome"], said["commit"]) == ("unchanged", hub.repos["me/it"].head)
    assert len(hub.repos["me/it"].commits) == commits == 2


def test_a_stack_without_its_members_comes_back_as_its_sum(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("push", "style+instruct", "me/teller", *ID)
    said = run("pull", "me/teller", "--registry", other_registry.root, "--json").json
    assert (said["adapter"], said["version"]) == ("style-instruct", 1)
    assert version(other_registry, "style-instruct@1").lora.r == 4
    assert (
        run("push", "style-instruct", "me/teller", "--registry", other_registry.root, "--json").json["outcome"]
        == "unchanged"
    )
    assert len(hub.repos["me/teller"].commits) == 2
    mine = run("pull", "me/teller", "--json").json  # the members are here, so it is the stack
    assert mine["stack"] == "style+instruct" and mine["added"] == ["style+instruct"]


def test_pull_again_is_nothing_to_do_and_a_moved_repo_is_a_new_version(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("push", "style@1", "me/style", *ID)
    run("pull", "me/style", "--registry", other_registry.root)
    before = tree(other_registry)
    hub.trace.clear()
    said = run("pull", "me/style", "--registry", other_registry.root, "--json").json
    assert (said["adapter"], said["version"], said["added"]) == ("style", 1, []) and tree(other_registry) == before
    assert not hub.requests("adapter_model.safetensors")
    old = hub.repos["me/style"].head
    run("push", "style@2", "me/style", *ID)
    said = run("pull", "me/style", "--registry", other_registry.root, "--json").json
    assert (said["version"], said["added"], said["commit"]) == (2, ["style@2"], hub.repos["me/style"].head)
    assert [v.version for v in other_registry.find_adapter("style").versions] == [1, 2]  # type: ignore[union-attr]
    assert run("pull", f"me/style@{old}", "--registry", other_registry.root, "--json").json["version"] == 1


def test_adapters_that_are_here_are_recognised(run: Callable[..., Any], own_registry: Registry, hub: HubServer) -> None:
    run("push", "style@1", "me/style", *ID)
    run("compose", "style+instruct", "--name", "teller")
    run("push", "teller", "me/teller", "--members", *ID)
    before = tree(own_registry)
    assert run("pull", "me/style", "--json").json["added"] == []
    assert run("pull", "me/teller", "--json").json["added"] == []
    assert tree(own_registry) == before


def test_a_number_that_is_taken_is_another_version(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    register(other_registry, "style", base="llama", seed=40)
    register(other_registry, "style", base="llama", seed=41)
    run("push", "style+instruct", "me/teller", "--members", *ID)
    said = run("pull", "me/teller", "--registry", other_registry.root, "--json").json
    assert said["added"] == ["style@3", "instruct@1", "style+instruct"]
    assert version(other_registry, "style@3").digest == version(own_registry, "style@2").digest
    assert version(other_registry, "instruct@1").trained_on == ["style@3:0.5"]
    assert [(m["adapter"], m["version"]) for m in said["members"]] == [("style", 3), ("instruct", 1)]


def test_a_name_of_ones_own(run: Callable[..., Any], own_registry: Registry, hub: HubServer) -> None:
    run("push", "style@1", "me/style", *ID)
    said = run("pull", "me/style", "--name", "copy", "--json").json
    assert (said["adapter"], said["version"]) == ("copy", 1) and said["digest"] == version(
        own_registry, "style@1"
    ).digest
    run("pull", "me/style", "--name", "../copy", code=2)
    run("compose", "style", "--name", "teller")
    run("pull", "me/style", "--name", "teller", code=2)
    run("push", "style+instruct", "me/teller", "--members", *ID)
    run("pull", "me/teller", "--name", "style", code=2)
    assert run("pull", "me/teller", "--name", "mine", "-q").out == "mine\n"
    run("pull", "me/teller", "--name", "style+copy", code=2)
    assert run("pull", "me/teller", "--name", "style+instruct", "-q").out == "style+instruct\n"


def test_a_stack_without_a_name_of_its_own_is_called_after_its_members_here(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("push", "style@1", "me/style", *ID)
    run("push", "style@1+instruct", "me/teller", "--members", *ID)
    there = ("--registry", other_registry.root)
    run("pull", "me/style", "--name", "voice", *there)
    run("pull", "me/teller", "--name", "style+instruct", *there, code=2)
    said = run("pull", "me/teller", *there, "--json").json
    assert (said["stack"], said["added"]) == ("voice+instruct", ["instruct@1", "voice+instruct"])
    repo = hub.repos["me/teller"]
    repo.commit({**repo.files, "stack.yaml": repo.files["stack.yaml"].replace(b"style+instruct", b"tone+instruct")})
    assert "reads as an expression" in run("pull", "me/teller", *there, "--json", code=4).json["error"]["message"]


# -- what it stands on ----------------------------------------------------------------------------------------------


def test_an_adapter_without_what_it_stands_on_says_where_that_is(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("push", "style@2", "me/style", *ID)
    run("push", "instruct", "me/instruct", *ID)
    ran = run("pull", "me/instruct", "--registry", other_registry.root)
    assert "stackctl pull me/style" in ran.err
    assert version(other_registry, "instruct@1").trained_on == ["style@2:0.5"]
    run("pull", "me/style", "--registry", other_registry.root)
    assert verify_registry(other_registry) == (3, [])


def test_another_adapter_of_that_name_is_not_taken_for_it(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    register(other_registry, "style", base="llama", seed=40)
    register(other_registry, "style", base="llama", seed=41)
    run("push", "style@2", "me/style", *ID)
    run("push", "instruct", "me/instruct", *ID)
    before = tree(other_registry)
    error = run("pull", "me/instruct", "--registry", other_registry.root, "--json", code=4).json["error"]
    assert "stackctl pull me/style" in error["hint"] and tree(other_registry) == before
    run("pull", "me/style", "--registry", other_registry.root)
    run("pull", "me/instruct", "--registry", other_registry.root)
    assert version(other_registry, "instruct@1").trained_on == ["style@3:0.5"]


def test_a_base_that_is_not_here_is_offered(
    run: Callable[..., Any], own_registry: Registry, tmp_path: Path, hub: HubServer
) -> None:
    run("push", "style@1", "me/style", *ID)
    init_registry(registry := tmp_path / "empty")
    error = run("pull", "me/style", "--registry", registry, "--json", code=3).json["error"]
    assert error["hint"] == f"stackctl base add --registry {registry} tiny acme/tiny"
    other = make_registry(tmp_path / "changed", make_base("tiny", "sha256:" + "0" * 64))
    before = tree(other)
    run("pull", "me/style", "--registry", other.root, code=4)
    assert tree(other) == before
    run("pull", "me/style", "--registry", other.root, "--base", "tiny")  # whoever insists
    assert version(other, "style@1").fingerprint == "sha256:" + "0" * 64


# -- bytes, faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("stack.yaml", "adapter: style", "adapter: ../../etc"),
        ("stack.yaml", "name: style+instruct", "name: ../x"),
        ("stack.yaml", "schema: 1", "schema: 1\nschema: 1"),
        ("members/style/adapter.yaml", "name: style", "name: ../x\nno: no"),
        ("members/style/adapter.yaml", "version: 2", "version: 0"),
        ("members/style/adapter.yaml", "schema: 1", "schema: 2"),
    ],
)
def test_entries_that_lead_out_or_lie_are_refused(
    run: Callable[..., Any],
    own_registry: Registry,
    other_registry: Registry,
    hub: HubServer,
    path: str,
    old: str,
    new: str,
) -> None:
    run("push", "style+instruct", "me/teller", "--members", *ID)
    repo = hub.repos["me/teller"]
    text = repo.files[path].decode()
    assert old in text
    repo.commit({**repo.files, path: text.replace(old, new, 1).encode()})
    before = tree(other_registry)
    error = run("pull", "me/teller", "--registry", other_registry.root, "--json", code=4).json["error"]
    assert path in error["message"] and tree(other_registry) == before


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "adapter_config.json", "adapter_info.json"])
def test_other_bytes_than_the_digest_says_are_exit_5_and_not_kept(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer, path: str
) -> None:
    run("push", "style@1", "me/style", *ID)
    before = tree(other_registry)
    hub.corrupt.add(path)
    error = run("pull", "me/style", "--registry", other_registry.root, "--json", code=5).json["error"]
    assert path in error["message"] and tree(other_registry) == before
    hub.heal()
    run("pull", "me/style", "--registry", other_registry.root)  # the cache did not keep them
    assert verify_registry(other_registry) == (2, [])


def test_a_repo_that_was_changed_behind_its_entry_is_exit_5(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer
) -> None:
    run("push", "style@1", "me/style", *ID)
    repo = hub.repos["me/style"]
    repo.commit({**repo.files, "adapter_model.safetensors": repo.files["adapter_model.safetensors"][:-1] + b"\x01"})
    before = tree(other_registry)
    run("pull", "me/style", "--registry", other_registry.root, code=5)
    assert tree(other_registry) == before


def test_no_such_repo_or_revision_is_exit_3(
    run: Callable[..., Any], own_registry: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", "style@1", "me/style", *ID)
    run("pull", "me/nobody", code=3)
    run("pull", "me/style@v9", code=3)
    assert "did you mean 'main'?" in run("pull", "me/style@mian", "--json", code=3).json["error"]["hint"]
    hub.fail("refs", status=503)
    assert "tree/main" in run("pull", "me/style@mian", "--json", code=3).json["error"]["hint"]
    run("pull", "me/style@", code=2)
    run("pull", "nonsense", code=2)
    hub.repos["me/style"].private = True
    assert run("pull", "me/style", "--json").json["version"] == 1
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in run("pull", "me/style", "--json", code=3).json["error"]["hint"]


@pytest.mark.parametrize("match", ["GET /api/models/me/style", "tree", "HEAD /me/style/resolve", "adapter_model"])
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 401}, {"status": 403}, {"status": 429}, {"status": 503, "body": [5]}, {"cut": True},
        {"status": 200, "body": [{"type": "file", "path": 5, "size": 1, "oid": "x"}]},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)  # fmt: skip
def test_every_fault_is_exit_6_leaves_nothing_and_the_retry_works(
    run: Callable[..., Any],
    own_registry: Registry,
    other_registry: Registry,
    hub: HubServer,
    match: str,
    fault: dict[str, Any],
) -> None:
    run("push", "style@1", "me/style", *ID)
    before = tree(other_registry)
    hub.fail(match, **{"body": {"error": f"no, {hub.token}"}, **fault})
    ran = run("pull", "me/style", "--registry", other_registry.root, "--json", code=6)
    assert "stackctl pull me/style" in ran.json["error"]["hint"] and tree(other_registry) == before
    assert sum(line.startswith("error:") for line in ran.err.splitlines()) == 1
    assert hub.token not in ran.out + ran.err and "Traceback" not in ran.err
    hub.heal()
    run("pull", "me/style", "--registry", other_registry.root)
    assert version(other_registry, "style@1").digest == version(own_registry, "style@1").digest


def test_a_cache_that_cannot_be_made_is_no_fault_of_the_server(
    run: Callable[..., Any],
    own_registry: Registry,
    other_registry: Registry,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    run("push", "style@1", "me/style", *ID)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    said = run("pull", "me/style", "--registry", other_registry.root, code=1).err
    assert f"not a directory ({tmp_path}/file" in said and hub.url not in said


def test_a_repo_that_is_gated_or_wants_a_login_says_what_to_do(
    run: Callable[..., Any], own_registry: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", "style@1", "me/style", *ID)
    hub.fail("GET /api/models/me/style", status=403, headers={"X-Error-Code": "GatedRepo"})
    error = run("pull", "me/style", "--json", code=6).json["error"]
    assert "gated" in error["message"] and "ask for access" in error["hint"]
    hub.heal()
    monkeypatch.delenv("HF_TOKEN")
    hub.fail("GET /api/models/me/style", status=401)
    error = run("pull", "me/style", "--json", code=6).json["error"]
    assert "log in" in error["message"] and error["hint"].startswith("hf auth login, then: stackctl pull me/style")


@pytest.mark.parametrize("times", [1, -1])
def test_weights_that_break_off_are_gone_on_from_or_told(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer, times: int
) -> None:
    run("push", "style@1", "me/style", *ID)
    before = tree(other_registry)
    hub.fail("GET /me/style/resolve", half=True, times=times)
    words = ("pull", "me/style", "--registry", other_registry.root, "--json")
    ran = run(*words, code=0 if times == 1 else 6)
    if times == -1:
        assert "broke" in ran.json["error"]["message"] and tree(other_registry) == before
        hub.heal()
        run(*words)
    assert version(other_registry, "style@1").digest == version(own_registry, "style@1").digest
    assert verify_registry(other_registry)[1] == []


def test_one_that_is_killed_at_any_request_leaves_nothing_half_done(
    run: Callable[..., Any], own_registry: Registry, other_registry: Registry, hub: HubServer, tmp_path: Path
) -> None:
    run("compose", "style@2+instruct", "--name", "both")
    run("push", "both", "me/both", *ID, "--members")
    empty, folder = tree(other_registry), other_registry.root.parent
    hub.trace.clear()
    words = ["pull", "me/both", "--registry", str(other_registry.root)]
    assert run_command(words, folder).code == 0
    whole, requests = tree(other_registry), len([line for line in hub.trace if "harness" not in line[1]])
    assert requests > 10
    for request in range(1, requests + 1, 2):
        for path in set(tree(other_registry)) - set(empty):
            (other_registry.root / path).unlink()
        shutil.rmtree(tmp_path / "hf" / "hub")
        ended = run_command(words, folder, prepare=ended_at(request, signal.SIGKILL, answered=request % 4 == 1))
        assert ended.code is None, ended.said
        assert verify_registry(other_registry)[1] == []
        assert run_command(words, folder).code == 0
        now = tree(other_registry)
        assert {path: data for path, data in now.items() if path.endswith("safetensors")} == {
            path: data for path, data in whole.items() if path.endswith("safetensors")
        }
        assert set(now) == set(whole)
        assert verify_registry(other_registry)[1] == []


def test_offline_a_silent_server_and_a_dry_run(
    run: Callable[..., Any],
    own_registry: Registry,
    other_registry: Registry,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    import stackctl.hub.http_client

    run("push", "style@1", "me/style", *ID)
    before = tree(other_registry)
    said = run("pull", "me/style", "--registry", other_registry.root, "--dry-run", "--json").json
    assert said["added"] == ["style@1"] and tree(other_registry) == before
    assert not hub.requests("GET /me/style/resolve/main/adapter_model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = run("pull", "me/style", "--registry", other_registry.root, "--json", code=6).json["error"]
    assert error["hint"] == f"HF_HUB_OFFLINE=0 stackctl pull me/style --registry {other_registry.root} --json"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(stackctl.hub.http_client, "TIMEOUT_SECONDS", 0.3)
    hub.fail("adapter_model", delay=30.0)
    assert (
        "silent"
        in run("pull", "me/style", "--registry", other_registry.root, "--json", code=6).json["error"]["message"]
    )
    assert tree(other_registry) == before


def test_a_base_is_fetched_once_and_then_asks_nobody(hub: HubServer) -> None:
    from stackctl.hub.client import download_base

    hub.repo("acme/tiny", {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"})
    folder, commit = download_base("acme/tiny", None, lambda _: None)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    hub.trace.clear()
    assert download_base("acme/tiny", commit, lambda _: None) == (folder, commit)
    assert hub.trace == []


def test_the_hint_repeats_all_that_was_typed(run: Callable[..., Any], hub: HubServer, other_registry: Any) -> None:
    words = ["pull", "me/style@v1", "--name", "mine", "--base", "llama", "--registry", str(other_registry.root)]
    hub.fail("GET /api/models/me/style", 503, times=99)
    assert shlex.join(["stackctl", *words]) in run(*words, code=6).err.splitlines()[-1]
