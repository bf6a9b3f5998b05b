"""``add --convert``: a plain LoRA of PEFT's other kinds, against what PEFT does with them live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from adapter_kinds import KINDS, LOUD, TARGETS, load_live, make_adapter, peft_config
from architectures import tiny_folder
from peft import LoraConfig, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from tiny import save_adapter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from stackctl.lora.convertible import CONVERTIBLE_TYPES

ROUNDING = 2e-6
LOW = ("ADALORA", "LOHA", "MISS", "TINYLORA", "UNILORA", "VBLORA", "VERA", "QALORA", "KASA", "PISSA", "OLORA", "HRA")
"""Kinds whose change of these layers has a small rank, and is kept whole."""

CUTS = (["--rank", 2], ["--tolerance", 0.3])


def fresh(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def deltas(live: Any, base: Any) -> dict[str, torch.Tensor]:
    """What a live adapter adds to each weight, in float64, by PEFT merging all of the model, which stays so."""
    before = {name: weight.double() for name, weight in base.state_dict().items()}
    merged = live.double()
    names = [name for name, layer in merged.base_model.model.named_modules() if isinstance(layer, BaseTunerLayer)]
    merged.merge_adapter()
    found = {}
    for name in names:
        weight = merged.base_model.model.get_submodule(name).get_base_layer().weight
        found[name] = weight.detach().double() - before[f"{name}.weight"]
    return found


def factors(path: Path) -> dict[str, torch.Tensor]:
    """The change of each module by a checkpoint's tensors and configuration, in float64, by hand."""
    from safetensors.torch import load_file

    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    found = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            found[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = b.double() @ a.double()
    return found


def shares(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    lost = sum(float((wanted[name] - found.get(name, 0)).square().sum()) for name in wanted)
    return (lost / sum(float(delta.square().sum()) for delta in wanted.values())) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_that_is_recorded_is_the_one_against_peft(h: Any, kind: str) -> None:
    """Whole, and cut by a rank or by a tolerance in turn: that is the same work on any change of a weight."""
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config(kind), path, scale=LOUD.get(kind, 0.1))
    name = kind.partition(" ")[0]
    refused = h.run("add", "x", path, code=4)
    assert f"stackctl add x {path} --convert" in refused.err
    bare, model, stacked = fresh(h.base), load_live(h.base, path), h.load()
    plain, live = oracle.logits(bare), oracle.logits(model)
    wanted = deltas(model, bare)
    for options in ([], CUTS[list(KINDS).index(kind) % 2]):
        made = h.run("add", "x", path, "--convert", *options, "--json").json
        version = made["version"]  # the same again where the rank is the same
        entry = h.run("inspect", f"x@{version}", "--json").json
        told = entry["converted"]
        assert told["from"] == name
        found = factors(h.weights("x", version))
        error = shares(found, wanted)
        assert told["relative_error"] == pytest.approx(error, rel=1e-3, abs=ROUNDING)
        for module, of_it in told["errors"].items():
            alone = shares({module: found[module]}, {module: wanted[module]})
            assert of_it == pytest.approx(alone, rel=1e-3, abs=ROUNDING)
            sigma = torch.linalg.svdvals(wanted[module])
            rank = int(torch.linalg.matrix_rank(found[module], rtol=1e-9))
            best = float(sigma[rank:].norm() / sigma.norm())
            assert alone <= 1.01 * best + ROUNDING, "the best of its rank"
            if options[:1] == ["--tolerance"]:
                assert alone <= 0.3
                assert float(sigma[rank - 1 :].norm() / sigma.norm()) > 0.3, "no rank more than needed"
        if options[:1] == ["--rank"]:
            assert entry["rank"] <= 2
        elif not options:
            assert error < (1e-5 if kind in LOW else 0.0101)
        now = oracle.relative(h.logits(stacked, f"x@{version}"), live, plain)
        assert now < max(1e-4, 5 * error), "and so is its effect"
    assert h.run("verify", "--json").json["problems"] == []
    h.adapters()


def test_each_type_of_peft_is_convertible_or_is_not_one_of_its_kinds() -> None:
    assert {kind for kind in KINDS if " " not in kind} >= CONVERTIBLE_TYPES
    assert {t.value for t in PeftType} >= CONVERTIBLE_TYPES


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "tied"])
def test_other_layers(tiny_registry: Any, name: str) -> None:
    """Conv1D, biases that IA³ scales with the rest, an embedding whose weight is the head's as well."""
    h = tiny_registry(name)
    path = h.folder / "made"
    config = {
        "gpt2": lambda: peft_config("DORA", target_modules=["c_attn", "c_proj"]),
        "qwen2": lambda: peft_config("GLORA"),
        "tied": lambda: peft_config("OFT", target_modules=["q_proj", "embed_tokens"]),
    }[name]()
    make_adapter(fresh(h.base), config, path)
    live = oracle.logits(load_live(h.base, path))
    h.run("add", "x", path, "--convert", "--tolerance", 1e-6)
    plain = oracle.logits(fresh(h.base))
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-4
    assert oracle.relative(oracle.logits(load_live(h.base, h.weights("x"))), live, plain) < 1e-4, "and to PEFT"


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("gpt2", "DORA", {"target_modules": ["c_attn"], "bias": "all"}),
        ("neox", "KASA", {"target_modules": ["dense_4h_to_h"], "bias": "all", "modules_to_save": ["embed_out"]}),
        ("qwen2", "DORA", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("tied", "OLORA", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
)
def test_biases_come_along_and_embeddings(tiny_registry: Any, name: str, kind: str, more: Any) -> None:
    """Those of norms and of layers that it does not adapt, too."""
    h = tiny_registry(name)
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config(kind, **more), path)
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    h.run("add", "x", path, "--convert", "--tolerance", 1e-6)
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-4
    assert oracle.relative(oracle.logits(load_live(h.base, h.weights("x"))), live, plain) < 1e-4, "and to PEFT"


def test_what_trained_on_a_stack_is_converted_against_it(h: Any) -> None:
    style = h.add("style", seed=1, scale=0.3)
    folded = oracle.live(h.base, (style, 1.0), dtype=torch.float32).merge_and_unload()
    path = h.folder / "dora"
    live = make_adapter(folded, peft_config("DORA"), path)
    wanted = oracle.logits(live)
    made = h.run("add", "voice", path, "--on", "style", "--convert", "--tolerance", 1e-6, "--json").json
    assert made["on"] == ["style@1"]
    stacked = h.load()
    assert oracle.relative(h.logits(stacked, "style+voice"), wanted, oracle.logits(fresh(h.base))) < 1e-4
    h.run("add", "alone", path, "--convert", "--tolerance", 1e-6)
    assert oracle.relative(h.logits(stacked, "style+alone"), wanted, oracle.logits(fresh(h.base))) > 0.01


def test_whole_modules_come_along(h: Any) -> None:
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config("LOKR", modules_to_save=["lm_head"]), path)
    h.run("add", "x", path, "--convert", "--tolerance", 1e-6)
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-4
    assert h.run("inspect", "x", "--json").json["converted"]["from"] == "LOKR"
    assert "from LOKR, 0.00% of the change is lost" in h.run("inspect", "x").out


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "targets", "saving"),
    [
        ("gpt2", "DORA", ["c_attn"], True),
        ("llama", "LOKR", ["q_proj"], True),
        ("tied", "DORA", ["q_proj", "embed_tokens"], False),
        ("neox", "DORA", ["dense"], True),
        ("neox", "DORA", ["embed_in", "dense"], True),
        ("gpt2", "PISSA", ["wte"], True),
        ("gpt2", "DORA", ["wte"], True),
    ],
)
def test_embeddings_that_are_saved_beside_the_adapter_come_along(
    tiny_registry: Any, name: str, kind: str, targets: list[str], saving: bool, changed: bool
) -> None:
    """``save_embedding_layers``, told or not: whole where they are not adapted, else in what is made of the layer."""
    h = tiny_registry(name)
    path = h.folder / "made"
    model = make_adapter(fresh(h.base), peft_config(kind, target_modules=targets), h.folder / "first")
    if changed and saving:
        with torch.no_grad():
            embedding = model.get_input_embeddings()
            weight = (embedding.get_base_layer() if isinstance(embedding, BaseTunerLayer) else embedding).weight
            weight += 0.1 * torch.randn_like(weight)
    save_adapter(model, path, save_embedding_layers=saving)
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    h.run("add", "x", path, "--convert", "--tolerance", 1e-6)
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-4
    assert oracle.relative(oracle.logits(load_live(h.base, h.weights("x"))), live, plain) < 1e-4, "and to PEFT"


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", ["PISSA", "OLORA", "DORA pissa", "OSF"])
def test_what_was_taken_out_of_a_head_is_gone_from_the_embedding_that_it_shares(
    tiny_registry: Any, kind: str, targets: list[str]
) -> None:
    h = tiny_registry("tied")
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config(kind, target_modules=targets), path)
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    h.run("add", "x", path, "--convert", "--tolerance", 1e-6)
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-5
    assert oracle.relative(oracle.logits(load_live(h.base, h.weights("x"))), live, plain) < 1e-5, "and to PEFT"


def test_an_olora_on_a_square_conv1d(tiny_registry: Any) -> None:
    """PEFT takes the product out of the weight as it is stored there, the other way round than it adds it."""
    h = tiny_registry("gpt2")
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config("OLORA", target_modules=["attn.c_proj"]), path)
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    h.run("add", "x", path, "--convert", "--tolerance", 1e-6)
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-5


@pytest.mark.parametrize("alpha", [0, -8])
def test_a_pissa_whose_alpha_peft_cannot_divide_by(h: Any, alpha: int) -> None:
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config("PISSA"), path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": alpha}))
    assert not torch.isfinite(oracle.logits(load_live(h.base, path))).all()
    refused = h.run("add", "x", path, "--convert", code=4).err
    assert "NaN or infinity" in refused and "lora_alpha" in refused


@pytest.mark.parametrize("begun", ["pissa_niter_4", "corda", "lora_ga"])
def test_what_was_taken_out_of_the_base_is_told_by_the_adapter_before_its_training(h: Any, begun: str) -> None:
    """As PEFT's own ``path_initial_model_for_weight_conversion``: the difference of both, at twice the rank."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    paths = {}
    for which, seed in (("before", 1), ("after", 2)):
        paths[which] = h.folder / which
        make_adapter(fresh(h.base), config, paths[which], seed=seed)
        file = paths[which] / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": begun}))
    refused = h.run("add", "x", paths["after"], code=4)
    assert "--convert --initial" in refused.err
    assert "--initial" in h.run("add", "x", paths["after"], "--convert", code=4).err
    made = h.run("add", "x", paths["after"], "--convert", "--initial", paths["before"], "--json").json
    assert made["rank"] == 8
    assert made["converted"]["relative_error"] < 1e-6
    found = factors(h.weights("x"))
    tensors = {which: oracle.load_file(path / "adapter_model.safetensors") for which, path in paths.items()}
    for module, delta in found.items():
        names = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "BA"]
        b, a = (tensors["after"][name].double() for name in names)
        b0, a0 = (tensors["before"][name].double() for name in names)
        assert torch.allclose(delta, 2 * (b @ a - b0 @ a0), atol=1e-6)


def test_an_adapter_that_peft_itself_loses_is_refused_for_that(run: Any, tmp_path: Path) -> None:
    """It renames the tensors of this kind of model when it loads them, and finds none."""
    base = tiny_folder("deepseek_ocr2", tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)
    targets = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)]
    make_adapter(
        AutoModelForImageTextToText.from_pretrained(base),
        peft_config("DORA", target_modules=targets),
        tmp_path / "made",
    )
    assert "PEFT does not find its tensors" in run("add", "x", tmp_path / "made", "--convert", code=4).err


def test_a_layer_that_is_not_called_has_nothing_to_convert(run: Any, tmp_path: Path) -> None:
    """PEFT puts its adapter beside the layer, whose weight alone Mamba reads: live it has no effect there."""
    base = tiny_folder("jamba", tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)
    for name, targets in (("x", ["dt_proj", "q_proj"]), ("y", ["dt_proj"])):
        config = peft_config("DORA", target_modules=targets)
        make_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / name)
    made = run("add", "x", tmp_path / "x", "--convert", "--rank", 32, "--json").json["converted"]
    assert made["output_error"] < 1e-4
    assert "changes no linear layer" in run("add", "y", tmp_path / "y", "--convert", code=4).err


def test_modules_that_share_a_weight_are_refused_before_anything_is_loaded(run: Any, tmp_path: Path) -> None:
    base = tiny_folder("zamba2", tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)
    config = peft_config("DORA", target_modules=["q_proj"])
    make_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "made")
    (base / "model.safetensors").unlink()
    assert "whose weight other modules use as well" in run("add", "x", tmp_path / "made", "--convert", code=4).err


def test_what_was_taken_out_of_a_tied_head_is_refused_where_only_the_beginning_tells(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    for which, seed in (("before", 1), ("after", 2)):
        make_adapter(fresh(h.base), config, h.folder / which, seed=seed)
    file = h.folder / "after/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa_niter_4"}))
    refused = h.run("add", "x", file.parent, "--convert", "--initial", h.folder / "before", code=4)
    assert "ties to its embedding" in refused.err


def test_bad_input_is_named_at_once_and_leaves_nothing(h: Any, models: Any) -> None:
    path = h.folder / "made"
    make_adapter(fresh(h.base), peft_config("LOHA"), path)
    for options, said in (
        (["--rank", 4], "--convert"),
        (["--convert", "--rank", 0, "--tolerance", 2, "--link"], "--link"),
        (["--convert", "--rank", 4, "--tolerance", 0.1], "two ways"),
        (["--convert", "--initial", path], "--initial"),
    ):
        assert said in h.run("add", "x", path, *options, code=2).err
    every = h.run("add", "x", path, "--convert", "--rank", 0, "--tolerance", 2, "--link", code=2).err
    assert all(word in every for word in ("--rank 0", "--tolerance 2", "--link", "two ways"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    names = sorted(tensors)

    def broken(folder: str, change: Any) -> Path:
        out = h.folder / folder
        out.mkdir()
        (out / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
        made = dict(tensors)
        change(made)
        save_file(made, out / "adapter_model.safetensors", {"format": "pt"})
        return out

    def misfit(made: dict[str, torch.Tensor]) -> None:
        made.pop(names[0])
        made[names[1]] = torch.zeros(3, 3)
        made["base_model.model.nowhere.hada_w1_a"] = torch.zeros(1)

    refused = h.run("add", "x", broken("misfit", misfit), "--convert", code=4).err
    assert all(word in refused for word in (names[0], names[1], "nowhere"))
    nan = broken("nan", lambda made: made[names[0]].fill_(float("nan")))
    assert names[0] in h.run("add", "x", nan, "--convert", code=5).err
    h.run("base", "add", "other", models("gpt2"))
    h.run("add", "x", path, "--base", "other", "--convert", code=4)
    prompt = h.folder / "prompt"
    make_adapter(
        fresh(h.base),
        PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4,
            num_transformer_submodules=1,
        ),
        prompt,
    )  # fmt: skip
    refused = h.run("add", "x", prompt, "--convert", code=4).err
    assert "PROMPT_TUNING" in refused and "--convert" not in refused
    plain = h.add("plain", seed=3)
    h.run("add", "again", plain, "--convert", "--rank", 2, code=2)
    h.run("add", "plain", plain, "--convert")
    assert h.adapters() == {"plain"}
