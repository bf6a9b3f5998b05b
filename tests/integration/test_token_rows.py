"""Rows of single tokens (PEFT's ``trainable_token_indices``): alone, weighted, added up, exported; tied and untied."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import yaml
from adapter_kinds import make_adapter
from architectures import tiny_folder
from member_weights import check_live_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SIZES, random_adapter, save_adapter, tiny_tokenizer
from tiny_registry import CHAT
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PhiConfig, PhiForCausalLM

from stackctl.engine.generation import Sampling, generate
from stackctl.engine.records.prompt_files import Prompt
from stackctl.engine.serving.batching import BatchingEngine
from stackctl.engine.serving.requests import Limits

TOKENS = torch.cat([oracle.TOKENS, torch.tensor([[3, 4, 5, 10, 11, 200]])], dim=1)
"""What logits are looked at with: the tokens whose rows are trained are among them."""
BOTH = {"embed_tokens": [5, 200], "lm_head": [5, 200]}


def must_not_load(*_: Any, **__: Any) -> Any:
    raise AssertionError("a base was loaded")


def peft_logits(base: Path, *paths: Path) -> torch.Tensor:
    """Raw PEFT: the last adapter live, those before it merged, since PEFT runs one with tokens at a time."""
    model: Any = oracle.load_plain(base)
    for path in paths[:-1]:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    for path in paths[-1:]:
        model = PeftModel.from_pretrained(model, path)
    return oracle.logits(model.double().eval(), TOKENS)


def summed(base: Path, members: Sequence[oracle.Member]) -> torch.Tensor:
    """W + Σ weight · (scaling · BA), and of each token's row W + weight · (value - W), in float64 from the files."""
    model = oracle.load_plain(base, torch.float64)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rows = []
    with torch.no_grad():
        for path, weight in members:
            for name, delta in oracle.deltas(path, weight).items():
                model.get_submodule(name.removeprefix("base_model.model.")).weight += delta
            told = json.loads((path / "adapter_config.json").read_text())["trainable_token_indices"]
            for name, value in oracle.factors_of(path).items():
                if "trainable_tokens" in name:
                    module = name.removeprefix("base_model.model.").partition(".token_adapter")[0]
                    tokens = told if isinstance(told, list) else next(told[k] for k in told if module.endswith(k))
                    rows.append((module, tokens, value, weight))
        if tied and {module for module, *_ in rows} - {"model.embed_tokens"}:
            weight = model.get_output_embeddings().weight
            model.get_output_embeddings().weight = torch.nn.Parameter(weight.clone())
        for module, tokens, value, weight in rows:
            target = model.get_submodule(module).weight
            own = target[tokens].clone()
            target[tokens] = own + weight * (value - own)
    return oracle.logits(model, TOKENS)


def folded(h: Any, stacked: Any, expression: str, *, live: bool = False) -> torch.Tensor:
    stacked.use(h.plan(expression).check(), live=live)
    return oracle.logits(stacked.model, TOKENS)


FORMS: dict[str, Any] = {
    "list": [3, 10],
    "one": {"embed_tokens": [4]},
    "both": BOTH,
    "head": {"lm_head": [11, 3]},
    "unlike": {"embed_tokens": [3], "lm_head": [10, 11]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "tied", "gemma"])
def test_one_member_is_what_peft_makes_of_it(tiny_registry: Any, kind: str, form: str) -> None:
    h = tiny_registry(kind)
    path = h.add("style", seed=1, trainable_token_indices=FORMS[form])
    stacked = h.load()
    before = {name: tensor.clone() for name, tensor in stacked.model.state_dict().items()}
    bare, wanted = peft_logits(h.base), peft_logits(h.base, path)
    assert oracle.relative(folded(h, stacked, "style"), wanted, bare) < 1e-5
    assert oracle.relative(folded(h, stacked, "style", live=True), wanted, bare) < 1e-5
    stacked.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in stacked.model.state_dict().items())
    if kind != "gemma":  # whose embedding is scaled in float32 by itself
        assert oracle.relative(summed(h.base, [(path, 1)]), wanted, bare) < 1e-6
        for weight in (0.5, -1.5):
            wanted = summed(h.base, [(path, weight)])
            for live in (False, True):
                assert oracle.relative(folded(h, stacked, f"style:{weight}", live=live), wanted, bare) < 1e-5
    assert torch.equal(folded(h, stacked, "style:0"), folded(h, stacked, "base"))


@pytest.mark.parametrize("more", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3, 10]}])
def test_an_embedding_that_computes_is_refused(run: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    """One that norms what it looks up, behind which PEFT adds its change: folded it would be normed as well."""
    base = tiny_folder("muse_spark", tmp_path / "base")
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base),
        LoraConfig(**{"r": 2, "target_modules": r".*language_model.*\.q_proj", **more}),
    )
    save_adapter(model, tmp_path / "made", save_embedding_layers=False)
    run("init")
    run("base", "add", "tiny", base)
    run("add", "x", tmp_path / "made")
    data = oracle.write_jsonl(tmp_path / "data.jsonl", CHAT)
    assert "NormedEmbedding" in run("eval", "x", "--data", data, code=4).err


@pytest.mark.parametrize("more", [("--target-modules", "embed_tokens,q_proj"), ("--train-tokens", "a")])
def test_nothing_is_trained_on_an_embedding_that_computes(run: Any, tmp_path: Path, more: tuple[str, str]) -> None:
    run("init")
    run("base", "add", "tiny", tiny_folder("muse_spark", tmp_path / "base"))
    data = oracle.write_jsonl(tmp_path / "data.jsonl", CHAT)
    told = run("train", "x", "--base", "tiny", "--data", data, *more, code=4).err
    assert "does more than look up a row" in told


def test_nothing_is_trained_on_rows_that_could_not_be_stacked(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    h.add("style", seed=1, trainable_token_indices=[3, 10])
    for target in ("embed_tokens", "q_proj,lm_head"):
        refused = h.run(
            "train", "chat", "--on", "style", "--data", h.data(), "--target-modules", target, "--max-steps", 1, code=4
        )
        assert "style@1 trained rows of single tokens" in refused.err
        assert f"{target.split(',')[-1]}, of which" in refused.err


@pytest.mark.parametrize("form", ["list", "one"])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_embeddings_that_peft_saved_beside_rows(tiny_registry: Any, kind: str, form: str, tmp_path: Path) -> None:
    """Of a tied pair the rows stand there twice; what lies under them is the base's own, or is refused."""
    h = tiny_registry(kind)
    tokens, told = [3, 10], "wte" if kind == "gpt2" else "embed_tokens"
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    path = random_adapter(
        h.base, tmp_path / "made", target_modules=targets,
        trainable_token_indices=tokens if form == "list" else {told: tokens},
    )  # fmt: skip
    live = PeftModel.from_pretrained(oracle.load_plain(h.base), path)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.2
    save_adapter(live, tmp_path / "saved", save_embedding_layers=True)
    tensors = load_file(tmp_path / "saved/adapter_model.safetensors")
    copies = [name for name in tensors if name.endswith("token_adapter.base_layer.weight")]
    assert len(copies) == (1 if kind == "llama" else 2)
    h.run("add", "style", tmp_path / "saved")
    wanted = peft_logits(h.base, tmp_path / "saved")
    assert oracle.relative(folded(h, h.load(), "style"), wanted, peft_logits(h.base)) < 1e-5
    if kind != "llama":  # of which the head was saved, too
        h.run("export", "style", "--format", "peft", "--out", tmp_path / "out")
        assert oracle.relative(peft_logits(h.base, tmp_path / "out"), wanted, peft_logits(h.base)) < 1e-5
    for name in copies:
        tensors[name] = tensors[name] + 0.1
    save_file(tensors, tmp_path / "saved/adapter_model.safetensors", {"format": "pt"})
    assert "which is not that of 'tiny'" in h.run("add", "other", tmp_path / "saved", code=4).err


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_members_that_train_different_tokens_add_up(tiny_registry: Any, kind: str, tmp_path: Path) -> None:
    h = tiny_registry(kind)
    style = h.add("style", seed=1, trainable_token_indices=[3, 10])
    chat = h.add("chat", seed=2, trainable_token_indices=BOTH)
    h.add("plain", seed=3)
    stacked, bare = h.load(), peft_logits(h.base)
    wanted = peft_logits(h.base, style, chat)
    for expression in ("style+chat", "chat+style"):
        for live in (False, True):
            assert oracle.relative(folded(h, stacked, expression, live=live), wanted, bare) < 1e-5
    weighted = "style:0.5+chat:-1+plain:2"
    members = [(h.paths["style"], 0.5), (h.paths["chat"], -1.0), (h.paths["plain"], 2.0)]
    wanted = summed(h.base, members)
    assert oracle.relative(folded(h, stacked, weighted), wanted, bare) < 1e-5
    for expression, target in ((weighted, wanted), ("style+chat", peft_logits(h.base, style, chat))):
        out = tmp_path / f"out-{expression[:7]}"
        exported = h.run("export", expression, "--format", "peft", "--out", out / "peft", "--json").json
        assert exported["exact"]
        assert exported["max_relative_error"] == 0
        assert oracle.relative(peft_logits(h.base, out / "peft"), target, bare) < 1e-5
        h.run("export", expression, "--format", "model", "--out", out / "model")
        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float64)
        assert model.config.tie_word_embeddings == (kind == "tied")
        assert oracle.relative(oracle.logits(model, TOKENS), target, bare) < 1e-5
    h.run("add", "again", tmp_path / "out-style:0" / "peft")
    assert oracle.relative(folded(h, stacked, "again"), wanted, bare) < 1e-5


@pytest.mark.parametrize("form", ["head", "unlike"])
def test_a_tied_pair_that_rows_make_different(tiny_registry: Any, form: str, tmp_path: Path) -> None:
    h = tiny_registry("tied")
    path = h.add("style", seed=1, trainable_token_indices=FORMS[form])
    bare = peft_logits(h.base)
    for expression, wanted in (("style", peft_logits(h.base, path)), ("style:2", summed(h.base, [(path, 2)]))):
        out = tmp_path / expression.replace(":", "-")
        h.run("export", expression, "--format", "peft", "--out", out / "peft")
        assert oracle.relative(peft_logits(h.base, out / "peft"), wanted, bare) < 1e-5
        h.run("export", expression, "--format", "model", "--out", out / "model")
        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float64)
        assert not model.config.tie_word_embeddings
        assert oracle.relative(oracle.logits(model, TOKENS), wanted, bare) < 1e-5


def test_half_precision_says_what_it_lost(tiny_registry: Any, tmp_path: Path) -> None:
    h = tiny_registry("tied")
    path = h.add("style", seed=1, trainable_token_indices=[3, 10])
    told = h.run("export", "style", "--dtype", "bfloat16", "--out", tmp_path / "half", "--json").json
    written = load_file(tmp_path / "half" / "adapter_model.safetensors")
    name = next(name for name in written if "trainable_tokens" in name)
    exact = oracle.factors_of(path)[name]
    own = oracle.load_plain(h.base).get_input_embeddings().weight[[3, 10]].detach().double()
    lost = float((written[name].double() - exact).norm() / (exact - own).norm())
    assert told["max_relative_error"] >= lost > 1e-4
    assert not told["exact"]


def test_a_token_is_one_members(h: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    h.add("style", seed=1, trainable_token_indices=[3, 10])
    h.add("chat", seed=2, trainable_token_indices={"embed_tokens": [10, 200]})
    h.add("apart", seed=3, trainable_token_indices={"lm_head": [10]})
    h.add("lora", seed=4, target_modules=["q_proj", "embed_tokens"])
    h.add("whole", seed=5, modules_to_save=["embed_tokens"])
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", must_not_load)
    out = tmp_path / "out"
    for command in (["compose"], ["generate", "-p", "x"], ["export", "--out", out], ["eval", "--data", h.data()]):
        message = h.run(*command, "style+chat", "--json", code=4).json["error"]["message"]
        assert "style@1 and chat@1" in message
        assert "the token 10 " in message
    h.run("compose", "style+apart")
    h.run("compose", "style+chat:0")
    for other in ("lora", "whole"):
        message = h.run("compose", f"style+{other}", "--json", code=4).json["error"]["message"]
        assert "style@1" in message
        assert f"{other}@1" in message
    message = h.run("compose", "style", "--method", "ties", "--json", code=4).json["error"]["message"]
    assert "style@1" in message
    assert "ties" in message
    assert not out.exists()


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_weight_by_module_stands_on_its_rows(tiny_registry: Any, kind: str, tmp_path: Path) -> None:
    h = tiny_registry(kind)
    path = h.add("style", seed=1, trainable_token_indices=BOTH)
    h.run("compose", "style", "--name", "s")
    file = h.folder / "registry" / "stacks" / "s.yaml"
    entry = yaml.safe_load(file.read_text())
    entry["members"][0]["layer_weights"] = {"lm_head": 0.5}
    file.write_text(yaml.safe_dump(entry, sort_keys=False))
    model = oracle.load_plain(h.base, torch.float64)
    rows = {name.split(".")[-3]: t for name, t in oracle.factors_of(path).items() if "trainable_tokens" in name}
    with torch.no_grad():
        for name, delta in oracle.deltas(path).items():
            model.get_submodule(name.removeprefix("base_model.model.")).weight += delta
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        tokens = BOTH["lm_head"]
        own = head.weight[tokens].clone()
        head.weight[tokens] = own + 0.5 * (rows.get("lm_head", rows["embed_tokens"]) - own)
        embedding.weight[tokens] = rows["embed_tokens"]
    wanted, bare = oracle.logits(model, TOKENS), peft_logits(h.base)
    assert oracle.relative(folded(h, h.load(), "s"), wanted, bare) < 1e-5
    h.run("export", "s", "--format", "model", "--out", tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert oracle.relative(oracle.logits(exported, TOKENS), wanted, bare) < 1e-5
    if kind == "tied":
        error = h.run("export", "s", "--format", "peft", "--out", tmp_path / "peft", "--json", code=4).json["error"]
        assert "ties" in error["message"]
        assert "--format model" in error["hint"]
    else:
        h.run("export", "s", "--format", "peft", "--out", tmp_path / "peft")
        assert oracle.relative(peft_logits(h.base, tmp_path / "peft"), wanted, bare) < 1e-5


def test_what_other_programs_take(h: Any, tmp_path: Path) -> None:
    h.add("style", seed=1, trainable_token_indices=[3, 10])
    for target in ("vllm", "gguf", "ollama"):
        problems = h.run("inspect", "style", "--for", target, "--json", code=None).json["problems"]
        assert f"{target}_tokens" in {p["code"] for p in problems if p["severity"] == "error"}
    error = h.run("export", "style", "--format", "gguf", "--out", tmp_path / "gguf", "--json", code=4).json["error"]
    assert "style@1 trained rows of single tokens" in error["message"]
    assert "--format model" in error["hint"]
    assert not (tmp_path / "gguf").exists()


def broken(h: Any, out: Path, **change: Any) -> Path:
    """A checkpoint whose configuration, or whose tensors, do not say what they should."""
    path = h.add("whole", seed=1, trainable_token_indices=[3, 10])
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    config["trainable_token_indices"] = change.get("tokens", [3, 10])
    if change.get("without"):
        tensors = {name: t for name, t in tensors.items() if "trainable_tokens" not in name}
    if change.get("narrow"):
        tensors = {name: t[:, :-1].contiguous() if "trainable" in name else t for name, t in tensors.items()}
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [3]}, "names 1 tokens"),
        ({"tokens": None}, "configuration does not name"),
        ({"tokens": {"lm_head": [3, 10]}}, "configuration does not name"),
        ({"tokens": [3, 3]}, "twice"),
        ({"tokens": [3, 260]}, "none of the tokens 260"),
        ({"tokens": [3, -1]}, "trainable_token_indices"),
        ({"tokens": ["a", 3]}, "trainable_token_indices"),
        ({"without": True}, "rows are missing"),
        ({"narrow": True}, "31 values"),
    ],
)
def test_a_checkpoint_that_does_not_fit_itself(h: Any, tmp_path: Path, change: Any, said: str) -> None:
    message = h.run("add", "odd", broken(h, tmp_path / "odd", **change), "--json", code=4).json["error"]["message"]
    assert said in message


def test_a_head_with_a_bias_is_refused(tiny_registry: Any, tmp_path: Path) -> None:
    """PEFT leaves that bias out where it has trained rows: what was trained is another model than a sum makes."""
    torch.manual_seed(0)
    folder = tmp_path / "phi"
    PhiForCausalLM(PhiConfig(**SIZES)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    h = tiny_registry("llama")
    h.run("base", "add", "phi", folder)
    path = random_adapter(folder, tmp_path / "made", trainable_token_indices={"lm_head": [3]})
    h.run("add", "odd", path, "--base", "phi")
    assert "bias" in h.run("generate", "odd", "-p", "x", "--json", code=4).json["error"]["message"]


@pytest.mark.parametrize("per", ["member", "module"])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_weights_can_be_learned(tiny_registry: Any, kind: str, per: Any) -> None:
    """A member's rows move with its weight: what a fit computes is what is folded, and its gradient the slope."""
    h = tiny_registry(kind)
    h.add("style", seed=1, trainable_token_indices=BOTH)
    h.add("chat", seed=2, trainable_token_indices=[3, 10])
    names = check_live_weights(h, {"style": 0.3, "chat": -1.2}, TOKENS, per)
    assert names == {""} if per == "member" else {"model.embed_tokens", "lm_head"} <= names


def test_what_fit_and_best_and_sweep_do(h: Any) -> None:
    h.add("style", seed=1, trainable_token_indices=[3, 10])
    data = h.data()
    made = h.run("compose", "style:0.7", "--name", "s", "--fit", data, "--fit-steps", 2, "--json").json
    loss = h.run("eval", "style:0.7", "--data", data, "--json").json["results"][0]["loss"]
    assert made["fit"]["held_out_before"] > 0
    swept = h.run("compose", "style", "--sweep", "style=0.7:1.2:0.5", "--data", data, "--json").json
    assert swept["sweep"][0]["loss"] == pytest.approx(loss, abs=1e-6)
    error = h.run("compose", "style", "--name", "b", "--method", "best", "--data", data, "--json", code=4).json["error"]
    assert "style@1" in error["message"]


def test_every_command_has_the_rows(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    h.add("style", seed=1, scale=0.3, trainable_token_indices=[3, 10])
    h.add("chat", seed=2, scale=0.3, trainable_token_indices=[104, 108, 200])
    asked = ["-p", "hello", "--raw", "--max-new-tokens", 12]
    texts = {}
    for what in ("style+chat", "style:0.5+chat", "style"):
        texts[what] = h.run("generate", what, *asked, "--json").json["text"]
        assert h.run("generate", what, *asked, "--live", "--json").json["text"] == texts[what]
    assert len(set(texts.values())) == 3
    compared = h.run("compare", *texts, *asked, "--json").json["results"]
    assert [found["text"] for found in compared] == list(texts.values())
    losses = {r["stack"]: r["loss"] for r in h.run("eval", *texts, "--data", h.data(), "--json").json["results"]}
    model = PeftModel.from_pretrained(oracle.load_plain(h.base), h.paths["style"])
    assert losses["style"] == pytest.approx(oracle.loss(model.eval(), CHAT), rel=1e-5)
    assert h.run("verify", "--json").json["problems"] == []
    shown = h.run("inspect", "style:0.5+chat", "--weights", "--interference", "--json").json
    assert [row["tokens"] for row in shown["token_rows"] if row["member"] == "chat@1"] == [[104, 108, 200]] * 2
    (norm,) = (row for row in shown["weights"] if row["module"] == "model.embed_tokens")
    own = oracle.load_plain(h.base).get_input_embeddings().weight.detach().double()
    for name, tokens, weight in (("style", [3, 10], 0.5), ("chat", [104, 108, 200], 1)):
        (rows,) = (t for n, t in oracle.factors_of(h.paths[name]).items() if "trainable" in n)
        assert norm["members"][f"{name}@1"] == pytest.approx(weight * float((rows - own[tokens]).norm()), rel=1e-5)
    text = h.run("inspect", "style+chat").out
    assert "rows of 104, 108, 200" in text
    assert "rows of 3, 10 in model.embed_tokens" in h.run("inspect", "style").out
    assert h.run("inspect", h.paths["style"], "--json").json["token_rows"][0]["tokens"] == [3, 10]


def test_a_served_stack_with_rows_is_answered_in_its_turn(h: Any) -> None:
    h.add("style", seed=1, scale=0.3, trainable_token_indices=[3, 10])
    h.add("plain", seed=2, scale=0.3)
    sampling, names = Sampling(max_new_tokens=12), ["style", "plain", "style:0.5+plain", "base"]
    stacked, known = h.load(), {}
    for name in names:
        stacked.use(h.plan(name))
        known[name] = next(generate(stacked, [Prompt("Hi.")], sampling)).text
    assert len(set(known.values())) == 4
    engine = BatchingEngine(h.load(), Limits(rows=4, wait=16))
    try:
        waiting = []
        for name in names * 2:
            (row,) = engine.prepare(h.plan(name), [Prompt("Hi.")], sampling)
            ended = threading.Event()
            row.on_end = lambda _, error, ended=ended: ended.set() if error is None else None
            waiting.append((name, row, ended))
        engine.submit([row for _, row, _ in waiting])
        for name, row, ended in waiting:
            assert ended.wait(60)
            assert row.text == known[name]
    finally:
        engine.close()


@pytest.mark.parametrize("what", ["style", "style:0.5+chat"])
def test_pushed_and_pulled(tiny_registry: Any, hub: Any, what: str, tmp_path: Path) -> None:
    h = tiny_registry("tied")
    style = h.add("style", seed=1, trainable_token_indices=[3, 10])
    h.train("chat", "--train-tokens", "<|im_end|>", "--max-steps", 1)
    h.run("compose", "style:0.5+chat", "--name", "s")
    h.run("push", "style" if what == "style" else "s", "me/it", "--base-id", "acme/tiny", "--members")
    served = tmp_path / "served"
    served.mkdir()
    for name, data in hub.repos["me/it"].files.items():
        if "/" not in name:
            (served / name).write_bytes(data)
    wanted: list[oracle.Member] = [(style, 1.0)] if what == "style" else [(style, 0.5), (h.weights("chat"), 1.0)]
    config = json.loads((served / "adapter_config.json").read_text())
    assert config["trainable_token_indices"]
    bare, target = peft_logits(h.base), summed(h.base, wanted)
    assert oracle.relative(peft_logits(h.base, served), target, bare) < 1e-5
    for name in ("s", "style", "chat"):
        h.run("rm", name)
    h.run("pull", "me/it", "--name", "back")
    assert oracle.relative(folded(h, h.load(), "back"), target, bare) < 1e-5
    if what != "style":
        assert h.run("inspect", "chat", "--json").json["trained_tokens"] == ["<|im_end|>"]


@pytest.mark.parametrize("told", [[5, 9], {"embed_tokens": [5, 9], "lm_head": [7]}])
def test_a_head_that_peft_does_not_see_is_tied_keeps_its_rows(run: Any, tmp_path: Path, told: Any) -> None:
    """Kosmos-2.5 says which weights are tied in a class inside it, and PEFT asks that of the whole model first."""
    base = tiny_folder("kosmos-2.5", tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)
    assert yaml.safe_load(Path("registry/bases/tiny.yaml").read_text())["rows_apart"]
    layers = [f"text_model.model.layers.{n}.self_attn.q_proj" for n in range(2)]
    config = LoraConfig(r=2, target_modules=layers, trainable_token_indices=told)
    path = tmp_path / "made"
    make_adapter(AutoModelForImageTextToText.from_pretrained(base), config, path)
    run("add", "x", path)
    run("export", "x", "--format", "model", "--out", tmp_path / "model")
    run("export", "x", "--format", "peft", "--out", tmp_path / "peft")

    def of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        return oracle.logits((PeftModel.from_pretrained(model, adapter) if adapter else model).eval(), TOKENS)

    bare, wanted = of(base), of(base, path)
    assert oracle.relative(of(tmp_path / "model"), wanted, bare) < 1e-5
    assert oracle.relative(of(base, tmp_path / "peft"), wanted, bare) < 1e-5
