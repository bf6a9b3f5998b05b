"""Layers whose weight a model reads without calling them, so that PEFT's LoRA beside them has no effect.

Folded, it has one: what is trained, kept live, fitted or extracted must not depend on which of the two it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from tiny import tiny_tokenizer
from tiny_registry import TEXTS, TinyRegistry

from stackctl.engine.base.loading import load_weights
from stackctl.engine.base.module_shapes import is_called, module_shapes
from stackctl.engine.evaluation.weighted_members import attached, read_factors

UNCALLED = "model.layers.0.mamba.dt_proj"


@pytest.fixture
def h(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> TinyRegistry:
    """Jamba, with an adapter on such a layer and on one that is called."""
    made = TinyRegistry(run, architectures.tiny_folder("jamba", tmp_path / "tiny"), tmp_path, monkeypatch)
    made.add("one", seed=1, target_modules=["dt_proj", "q_proj"])
    made.add("plain", seed=2, target_modules=["q_proj"])
    return made


@pytest.mark.parametrize(
    ("kind", "last_name"),
    [
        ("mamba", "dt_proj"),
        ("falcon_mamba", "dt_proj"),
        ("jamba", "dt_proj"),
        ("longcat_flash", "classifier"),
        ("prophetnet", "ngram_embeddings"),
        ("llama", ""),
        ("zamba", ""),
    ],
)
def test_a_layer_is_uncalled_if_its_weight_counts_and_its_forward_never_runs(kind: str, last_name: str) -> None:
    model = architectures.tiny_model(kind).eval()
    ran: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    before = oracle.logits(model)
    found = [name for name in module_shapes(model) if not is_called(model, name)]
    assert {name.rpartition(".")[2] for name in found} == ({last_name} if last_name else set())
    assert not ran & set(found)
    for name in found:
        model.get_submodule(name).weight.data *= 1.5
        assert not torch.equal(oracle.logits(model), before)


def test_a_stack_on_one_is_not_kept_live(h: TinyRegistry) -> None:
    why = f"error: one@1 changes {UNCALLED}, which JambaForCausalLM does not call but reads the weight of"
    for command in (["train", "new", "--on", "one", "--data", h.data(TEXTS), "--max-steps", 1, "--frozen", "live"],
                    ["generate", "one", "-p", "x", "--live"]):  # fmt: skip
        assert why in h.run(*command, code=4).err
    h.run("generate", "plain", "-p", "x", "--raw", "--max-new-tokens", 1, "--live")
    h.run("generate", "one", "-p", "x", "--raw", "--max-new-tokens", 1)


@pytest.mark.parametrize("more", [{"target_modules": ["dt_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_a_stack_that_four_bits_cannot_have_live_is_said_to_be_folded_without_them(
    more: dict[str, Any], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = TinyRegistry(run, architectures.tiny_folder("mamba", tmp_path / "tiny"), tmp_path, monkeypatch)
    h.add("one", seed=1, **{"target_modules": ["x_proj"], **more})
    job = ["train", "new", "--on", "one", "--data", h.data(TEXTS), "--max-steps", 1]
    said = run(*job, "--dtype", "nf4", "--frozen", "live", code=4).err
    assert "hint: fold it: train without --dtype nf4, and without --frozen live" in said
    assert run(*job, "--json").json["frozen"] == "fold"


def test_nothing_is_trained_on_one(h: TinyRegistry) -> None:
    job = ["train", "new", "--base", "tiny", "--data", h.data(TEXTS), "--dry-run"]
    plan = h.run(*job, "--json").json
    assert plan["leaves_out"][UNCALLED] == "the model reads its weight without calling it"
    assert UNCALLED not in plan["adapts"]
    named = h.run(*job, "--target-modules", "dt_proj", code=4)
    assert f"{UNCALLED} of 'tiny' cannot be adapted: the model reads its weight without calling it" in named.err


def test_its_weight_is_fitted_as_folding_counts_it(h: TinyRegistry) -> None:
    """The first loss of a fit, whose gradient it follows, is that of the folded stack."""
    plan, stacked = h.plan("one:-1.5"), h.load()
    bare = oracle.logits(stacked.model)
    factors = read_factors(plan, "member")
    with attached(stacked.model, factors, lambda: torch.tensor(factors.start())):
        beside = oracle.logits(stacked.model)
    stacked.use(plan)
    assert oracle.relative(beside, oracle.logits(stacked.model), bare) < 1e-4


def test_what_extract_finds_on_one_is_read_by_plain_peft(h: TinyRegistry, tmp_path: Path) -> None:
    tuned = PeftModel.from_pretrained(oracle.load_plain(h.base), h.paths["one"]).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    done = h.run("extract", "found", "--base", "tiny", "--tuned", tmp_path / "tuned", "--rank", 8, "--json").json
    assert done["saved"] == [UNCALLED]
    again = PeftModel.from_pretrained(oracle.load_plain(h.base), done["path"])
    bare = oracle.logits(oracle.load_plain(h.base))
    assert oracle.relative(oracle.logits(again), oracle.logits(tuned), bare) < 1e-4


def test_extract_refuses_an_embedding_that_has_another_name_in_the_files(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = TinyRegistry(run, architectures.tiny_folder("prophetnet", tmp_path / "tiny"), tmp_path, monkeypatch)
    tuned = oracle.load_plain(h.base)
    with torch.no_grad():
        tuned.prophetnet.decoder.layers[0].feed_forward.intermediate.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    said = run("extract", "found", "--base", "tiny", "--tuned", tmp_path / "tuned", code=4).err
    assert "'tiny' has prophetnet.decoder.word_embeddings.weight under another name in its files" in said


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", "longcat_flash"])
def test_four_bits_leave_it_readable(kind: str, tmp_path: Path) -> None:
    folder = architectures.tiny_folder(kind, tmp_path / kind)
    packed = load_weights(folder, torch.float32, torch.device("cpu"), four_bits=True).eval()
    plain = architectures.tiny_model(kind).eval()
    found = [name for name in module_shapes(plain) if not is_called(plain, name)]
    for name in found:
        assert torch.equal(packed.get_submodule(name).weight, plain.get_submodule(name).weight)
    others = [module for module in packed.modules() if isinstance(module, Linear4bit)]
    assert others
    assert packed.get_output_embeddings().weight.dtype == torch.float32
    dequantised = architectures.tiny_model(kind).eval()
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            own = dequantize_4bit(module.weight.data, module.weight.quant_state)
            dequantised.get_submodule(name).weight.data = own.float()
    wanted = oracle.logits(dequantised)
    assert float((oracle.logits(packed) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_a_stack_is_live_on_four_bits_where_they_are_called(h: TinyRegistry) -> None:
    """Jamba calls the layer where it is quantised, so that the stack has its effect there."""
    job = ["train", "new", "--on", "one", "--data", h.data(TEXTS), "--max-steps", 1, "--dtype", "nf4", "--json"]
    assert h.run(*job).json["frozen"] == "live"
    model = load_weights(h.base, torch.float32, torch.device("cpu"), four_bits=True)
    live = PeftModel.from_pretrained(model, h.paths["one"]).eval()
    assert h.log("new")[0]["loss"] == pytest.approx(oracle.loss(live, TEXTS), rel=1e-5)
