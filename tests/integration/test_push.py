"""Push through the real huggingface_hub to a server on this machine: what goes up, and what happens when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import lora_config, make_registry, write_checkpoint
from hub_server import HubServer

from stackctl.core.schema import Adapter
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry

ID = ("--base-id", "acme/tiny")
CHECKPOINT = {"README.md", "adapter.yaml", "adapter_config.json", "adapter_info.json", "adapter_model.safetensors"}
COMMIT = "POST /api/models/me/style/commit"


def weights_of(registry: Registry, label: str) -> bytes:
    name, _, version = label.partition("@")
    return (registry.root / "weights" / name / version / "adapter_model.safetensors").read_bytes()


def front_matter(card: bytes) -> dict[str, Any]:
    loaded = yaml.safe_load(card.decode().split("---\n", 2)[1])
    assert isinstance(loaded, dict)
    return loaded


# -- what goes up ---------------------------------------------------------------------------------------------------


def test_an_adapter_goes_up_in_one_commit(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    said = run("push", "style", "me/style", *ID, "--json").json
    repo = hub.repos["me/style"]
    assert said["commit"] == repo.head and said["repo"] == "me/style"
    assert said["url"] == f"{hub.url}/me/style/commit/{repo.head}"
    assert {f["path"] for f in said["files"]} == CHECKPOINT == set(repo.files) - {".gitattributes"}
    assert {f["status"] for f in said["files"]} == {"new"}
    assert all(f["bytes"] == len(repo.files[f["path"]]) for f in said["files"])
    assert len(repo.commits) == 2  # the one that the Hub makes, and ours
    assert repo.files["adapter_model.safetensors"] == weights_of(here, "style@1")


@pytest.mark.parametrize("what", ["linked", "linked+instruct"])
def test_links_out_of_a_checkpoint_do_not_go_up(
    run: Callable[..., Any], here: Registry, tmp_path: Path, hub: HubServer, what: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"token": "hunter2"}')
    folder = write_checkpoint(tmp_path / "theirs", lora_config(), seed=7)
    names = ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_log.jsonl")
    for name in names:
        (folder / name).symlink_to(secret)
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").symlink_to("vocab.json")  # one of the same folder is as good as the file
    run("add", "linked", folder, "--base", "tiny", "--link")
    run("push", what, "me/linked", *ID, "--members")
    files = hub.repos["me/linked"].files
    assert not [path for path, data in files.items() if b"hunter2" in data]
    assert not [path for path in files if path.rpartition("/")[2] in names[1:]]
    assert any(path.endswith("merges.txt") for path in files)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_checkpoint_whose_own_files_lead_elsewhere_is_not_pushed(
    run: Callable[..., Any], here: Registry, tmp_path: Path, hub: HubServer, name: str
) -> None:
    folder = write_checkpoint(tmp_path / "theirs", lora_config(), seed=7)
    run("add", "linked", folder, "--base", "tiny", "--link")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "links out of that folder" in run("push", "linked", "me/linked", *ID, code=4).err
    assert "me/linked" not in hub.repos


def test_the_requests_of_one_push(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    run("push", "style", "me/style", *ID)
    repo = hub.repos["me/style"]
    first, head = repo.commits
    oid = next(iter(hub.lfs))
    assert hub.trace == [
        ("GET", "/api/models/me/style", 404),
        ("POST", "/api/repos/create", 200),
        ("GET", "/api/models/me/style", 200),
        ("GET", f"/api/models/me/style/tree/{first}", 200),
        ("POST", "/api/validate-yaml", 200),
        ("POST", "/api/models/me/style/preupload/main", 200),
        ("POST", "/me/style.git/info/lfs/objects/batch", 200),
        ("PUT", f"/lfs/{oid}", 200),
        ("POST", "/api/models/me/style/commit/main", 200),
        ("GET", f"/api/models/me/style/tree/{head}", 200),
    ]


def test_nothing_changed_is_no_commit(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    first = run("push", "style", "me/style", *ID, "--json").json
    hub.trace.clear()
    again = run("push", "style", "me/style", *ID, "--json").json
    assert again["commit"] == first["commit"] and again["url"] == first["url"] and again["outcome"] == "unchanged"
    assert len(hub.repos["me/style"].commits) == 2
    assert not [line for line in hub.trace if line[0] in ("POST", "PUT")]
    assert "nothing changed" in run("push", "style", "me/style", *ID).out


def test_only_what_changed_goes_up(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    run("push", "style", "me/style", *ID)
    hub.trace.clear()
    said = run("push", "style", "me/style", *ID, "--license", "mit", "--json").json
    assert {f["path"]: f["status"] for f in said["files"]} == dict.fromkeys(CHECKPOINT, "unchanged") | {
        "README.md": "changed"
    }
    assert not hub.requests("/lfs/") and not hub.requests("objects/batch")


def test_quiet_prints_the_url_alone(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    ran = run("push", "style", "me/style", *ID, "-q")
    assert ran.out == f"{hub.url}/me/style/commit/{hub.repos['me/style'].head}\n" and ran.err == ""


def test_no_local_path_goes_up(run: Callable[..., Any], tmp_path: Path, hub: HubServer) -> None:
    registry = make_registry(tmp_path / "registry")
    folder = write_checkpoint(tmp_path / "made", lora_config(base_model_name_or_path=str(tmp_path / "base")))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(tmp_path / "base"), "pad": "x"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "secret.txt").write_text("not part of an adapter")
    run("add", "style", folder)
    entry = registry.find_adapter("style")
    assert isinstance(entry, Adapter)
    run("push", "style", "me/style", *ID)
    files = hub.repos["me/style"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    assert json.loads(files["tokenizer_config.json"]) == {"pad": "x"}
    assert "secret.txt" not in files and "tokenizer.json" in files
    assert not [path for path, data in files.items() if str(tmp_path).encode() in data]


def test_the_loss_curve_goes_up_as_a_picture(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    log = here.root / "weights/style/1/training_log.jsonl"
    log.write_text('{"step": 1, "loss": 3.0, "learning_rate": 1e-4}\n{"step": 2, "loss": 2.0}\n')
    run("push", "style", "me/style", *ID)
    files = hub.repos["me/style"].files
    assert files["training_loss.svg"].startswith(b"<svg") and b"2</text>" in files["training_loss.svg"]
    assert files["training_log.jsonl"] == log.read_bytes()


def test_an_adapter_on_another_says_which_and_where(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    run("push", "style", "me/style", *ID)
    run("push", "instruct", "me/instruct", *ID)
    files = hub.repos["me/instruct"].files
    style = here.find_adapter("style")
    assert style is not None and style.newest().pushed is not None
    assert style.newest().pushed.commit == hub.repos["me/style"].head  # type: ignore[union-attr]
    assert json.loads(files["adapter_info.json"])["trained_on"] == [
        {"adapter": "style", "version": 1, "digest": style.newest().digest, "weight": 1.0, "repo": "me/style"}
    ]
    assert b"https://huggingface.co/me/style" in files["README.md"]


def test_a_stack_is_its_sum_its_recipe_and_its_members(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    run("compose", "style:0.5+instruct", "--name", "teller")
    run("push", "me/teller", "--members", *ID)  # the current stack
    files = hub.repos["me/teller"].files
    recipe = yaml.safe_load(files["stack.yaml"])
    assert recipe["name"] == "teller"
    assert [(m["adapter"], m["version"], m["weight"]) for m in recipe["members"]] == [
        ("style", 1, 0.5),
        ("instruct", 1, 1),
    ]
    for member in recipe["members"]:
        entry = here.find_adapter(member["adapter"])
        assert entry is not None and member["digest"] == entry.newest().digest
        name = member["adapter"]
        assert files[f"members/{name}/adapter_model.safetensors"] == weights_of(here, f"{name}@1")
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["base_model_name_or_path"]) == (4, "acme/tiny")
    run("push", "teller", "me/teller", *ID)  # now without its members
    left = hub.repos["me/teller"].files
    assert set(left) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "stack.yaml",
    }


def test_files_of_others_stay(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    hub.repo("me/style", {"notes.md": b"mine", "stack.yaml": b"of an earlier push", "samples/a.txt": b"a"})
    said = run("push", "style", "me/style", *ID, "--json").json
    assert {f["path"] for f in said["files"] if f["status"] == "removed"} == {"stack.yaml"}
    assert {"notes.md", "samples/a.txt", ".gitattributes"} <= set(hub.repos["me/style"].files)


def test_what_a_person_wrote_into_the_card_stays(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    hub.repo("me/style", {"README.md": b"---\nlicense: mit\nlanguage: de\n---\n# old\n"})
    run("push", "style", "me/style", *ID)
    matter = front_matter(hub.repos["me/style"].files["README.md"])
    assert (matter["license"], matter["language"], matter["base_model"]) == ("mit", ["de"], "acme/tiny")


def test_the_base_must_have_a_name_on_the_hub(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    ran = run("push", "style", "me/style", "--json", code=2)
    assert "--base-id" in ran.json["error"]["hint"] and not hub.trace
    for wrong in ("", "/tmp/base", "base", "../a/b", "a/b/c"):
        run("push", "style", "me/style", "--base-id", wrong, code=2)
    assert not hub.trace


def test_options_of_a_push(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    run("push-to-hub", "style", "me/style", *ID, "--private", "-m", "hello", "--tag", "v1")
    repo = hub.repos["me/style"]
    assert repo.private and repo.messages[-1] == "hello" and repo.refs["v1"] == repo.head
    run("push", "style", "me/style", *ID, "--tag", "v1")  # it has that tag already
    old = repo.head
    ran = run("push", "style", "me/style", *ID, "--license", "mit", "--tag", "v1", "--json", code=6)
    assert repo.refs["v1"] == old != repo.head and "the files are pushed" in ran.json["error"]["message"]


def test_a_branch_and_a_pull_request(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    repo = hub.repo("me/style")
    before = repo.head
    repo.refs["next"] = before
    said = run("push", "style", "me/style", *ID, "--revision", "next", "--json").json
    assert repo.head == before and repo.refs["next"] == said["commit"]
    said = run("push", "style", "me/style", *ID, "--create-pr", "--json").json
    assert said["url"] == said["pull_request"] == f"{hub.url}/me/style/discussions/1"
    assert repo.head == before and repo.refs["refs/pr/1"] == said["commit"]
    run("push", "style", "me/style", *ID, "--revision", "nowhere", code=3)
    run("push", "style", "me/other", *ID, "--revision", "next", code=3)
    run("push", "style", "me/other", *ID, "--create-pr", code=3)
    assert "me/other" not in hub.repos


def test_private_is_not_a_wish_that_is_forgotten(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    hub.repo("me/style")
    run("push", "style", "me/style", *ID, "--private", code=2)
    assert len(hub.repos["me/style"].commits) == 1


def test_a_dry_run_changes_nothing(
    run: Callable[..., Any], here: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run("push", "style", "me/style", *ID, "--dry-run", "--json").json
    assert {f["path"] for f in said["files"]} == CHECKPOINT and said["commit"] is None
    assert not hub.repos and {line[0] for line in hub.trace} == {"GET"}
    monkeypatch.delenv("HF_TOKEN")
    hub.fail("GET", cut=True)
    offline = run("push", "style", "me/style", *ID, "--dry-run", "--json").json
    assert offline["files"] == said["files"]


def test_a_push_can_be_prepared_without_asking_anybody(here: Registry, hub: HubServer, monkeypatch: Any) -> None:
    """What the demo shows: the same files as a push sends."""
    from stackctl.core.command_line import CommandLine
    from stackctl.hub.push import PushOptions, prepare

    monkeypatch.delenv("HF_TOKEN")
    line = CommandLine(("stackctl", "push", "style", "me/style"))
    options = PushOptions(line, lambda *_: None, base_id="acme/tiny")
    files = prepare(here, resolve_expression(here, "style"), "me/style", options)
    assert {file.path for file in files} == CHECKPOINT and not hub.trace


def test_what_is_named_decides_what_goes_where(
    run: Callable[..., Any], here: Registry, hub: HubServer, tmp_path: Path
) -> None:
    run("push", code=2)
    run("push", "style", code=2)
    run("push", "style", "not/a/repo", *ID, code=2)
    run("push", "base", "me/base", *ID, code=2)
    run("push", "styel", "me/style", *ID, code=3)
    run("compose", "style+instruct", "--name", "teller")
    recipe = (
        "stacks: {teller: style+instruct}\npush: {stack: teller, repo: me/teller, base_id: acme/tiny, private: true}\n"
    )
    (tmp_path / "stackctl.yaml").write_text(recipe)
    run("push")
    assert "stack.yaml" in hub.repos["me/teller"].files and hub.repos["me/teller"].private


def test_changed_files_are_not_pushed(run: Callable[..., Any], here: Registry, hub: HubServer) -> None:
    path = here.root / "weights/style/1/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    run("push", "style", "me/style", *ID, code=5)
    assert not hub.trace


# -- what others load -----------------------------------------------------------------------------------------------


def test_plain_peft_loads_the_whole_stack(
    run: Callable[..., Any], registry: Path, models: Any, hub: HubServer, tmp_path: Path
) -> None:
    """push, snapshot_download, plain PEFT: the logits of base + 0.5 style + instruct, worked out by hand."""
    import torch
    from huggingface_hub import snapshot_download
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)

    for seed, (name, rslora) in enumerate({"style": True, "instruct": False}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4 + seed, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=rslora, init_lora_weights=False
        )
        get_peft_model(base(), config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(models("llama")).save_pretrained(tmp_path / name)
        run("add", name, tmp_path / name)
    run("push", "style:0.5+instruct", "me/teller", *ID)
    folder = snapshot_download("me/teller")
    tokens = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base(), folder).eval()(tokens).logits
        summed = base()
        for name, weight in (("style", 0.5), ("instruct", 1.0)):
            alone = PeftModel.from_pretrained(base(), tmp_path / name).merge_and_unload()
            for parameter, other, plain in zip(
                summed.parameters(), alone.parameters(), base().parameters(), strict=True
            ):
                parameter += weight * (other - plain)
        expected = summed(tokens).logits
        unlike = base()(tokens).logits
    assert float((loaded - expected).norm() / expected.norm()) < 1e-5
    assert float((unlike - expected).norm() / expected.norm()) > 1e-2
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_what_is_no_data_set_on_the_hub_is_refused_before_anything_is_asked(
    run: Callable[..., Any], here: Registry, hub: HubServer
) -> None:
    wrong = ["a b", "a/b/c", "me/data:train", "../x"]
    words = [word for one in [*wrong, "squad", "me/data-v1.5"] for word in ("--dataset", one)]
    said = run("push", "style", "me/style", *ID, *words, code=2).err
    assert all(repr(one) in said for one in wrong) and "squad" not in said and "v1.5" not in said
    said = run("push", "style", "me/sty le", "--tag", "v 1", "--revision", "a..b", *words, code=2).err
    assert all(f"'{one}'" in said for one in [*wrong, "me/sty le", "v 1", "a..b"])
    assert not hub.requests("") and not hub.repos
