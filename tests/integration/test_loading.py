"""Loading a base in another precision than that of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from stackctl.engine.models import load_base
from stackctl.registry import Registry


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral"])
def test_a_converted_base_is_what_transformers_makes_of_it(house: Any, name: str) -> None:
    h = house(name)
    wanted = AutoModelForCausalLM.from_pretrained(h.base, dtype=torch.bfloat16)
    found = h.load("bfloat16").model
    assert type(found) is type(wanted)
    assert {n: t.dtype for n, t in found.state_dict().items()} == {n: t.dtype for n, t in wanted.state_dict().items()}
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (name in ("tied", "gpt2"))
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()


def test_it_knows_every_token_that_ends_an_answer(run: Any, models: Any, tmp_path: Path) -> None:
    """A base that names several in its generation settings, as Llama 3 does, keeps them."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(models("llama")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=[257, 10]).save_pretrained(folder)
    run("init")
    run("base", "add", "other", folder)
    registry = Registry(tmp_path / "registry")
    assert load_base(registry.base("other"), registry, dtype="bfloat16").model.generation_config.eos_token_id == [
        257,
        10,
    ]


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_converting_needs_the_memory_of_what_comes_out(run: Any, tmp_path: Path) -> None:
    """Not also that of the file, which is twice as large."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 260}
    folder = tmp_path / "model"
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=256, eos_token_id=257))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    own = model.num_parameters() * 2 / 2**20
    del model
    run("init")
    run("base", "add", "larger", folder)
    registry = Registry(tmp_path / "registry")
    base = registry.base("larger")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what there is now
    before = peak_megabytes()
    loaded = load_base(base, registry, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert peak_megabytes() - before < 1.15 * own
