"""Every kind of causal language model, from ``base add`` to both exports, beside plain PEFT and transformers.

``python -m tests.stress.architectures [TYPE...]`` looks at some model types, or at all of them; with ``--write`` what
came of all of them is written down in docs/reference/architectures.md. Each type gets a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

from stress.runner import Budget, Outcome

RECORDS = [{"text": text} for text in ("the sea and the wind", "a stone, and under it a word", "it rains")]
PROMPTS = ("the sea", "a stone, and under it a word", "rain")
"""Of unlike lengths, answered at once."""
LOOSE = 1e-5
"""By how much a loss may differ from plain PEFT's, relative."""
_SECONDS = 180


@dataclass(frozen=True)
class Finding:
    """What came of a model type: ``right``, ``refused``, ``failed`` or ``unbuilt``, and why or where."""

    model_type: str
    outcome: str
    step: str = ""
    why: str = ""
    seconds: float = 0.0


class Refused(Exception):
    """A command that ended with a code for what cannot be done, before any work began."""


class Wrong(Exception):
    """What should not have happened."""


@dataclass
class Look:
    """One model type under way; ``step`` is what is being done."""

    model_type: str
    folder: Path
    step: str = "build"

    def run(self, *arguments: object, may_refuse: bool = False) -> Any:
        """A command in this process; its JSON."""
        from stackctl.cli import main

        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["stackctl", *map(str, arguments), "--json"]
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        if code:
            lines = [line for line in err.getvalue().splitlines() if line.startswith(("error:", "hint:"))]
            told = " | ".join(lines) or err.getvalue()[-400:]
            if may_refuse and code == 4 and "bug" not in told:
                raise Refused(told)
            raise Wrong(f"exit {code}: {told}")
        documents = [json.loads(line) for line in out.getvalue().split("\n") if line]
        return documents if arguments[0] == "generate" else documents[0]

    def do(self) -> None:
        import architectures

        base = self.folder / "base"
        with contextlib.redirect_stderr(io.StringIO()):
            architectures.tiny_folder(self.model_type, base)
        data = self.folder / "text.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        os.chdir(self.folder)
        self.run("init")
        self.loss(self.load(base))  # what transformers cannot do by itself is no matter of stackctl's
        self.step = "base add"
        self.run("base", "add", "tiny", base, may_refuse=True)
        plain = ["--data", data, "--rank", 2, "--learning-rate", 0.02, "--max-steps", 3, "--seed", 1]
        self.step = "dry run"
        self.run("train", "a", "--base", "tiny", *plain, "--dry-run", may_refuse=True)
        self.step = "train"
        self.run("train", "a", "--base", "tiny", *plain)
        self.step = "train on top"
        self.run("train", "b", "--on", "a", *plain)
        self.step = "PEFT loads"
        wanted = self.plain_losses(base)
        self.step = "eval"
        found = {row["stack"]: row["loss"] for row in self.run("eval", "base", "a", "a+b", "--data", data)["results"]}
        self.close("base", found["base"], wanted["base"])
        self.close("a", found["a"], wanted["a"])
        self.close("a+b", found["a+b"], wanted["a+b"])
        if not abs(wanted["a"] - wanted["base"]) > 1e-4 or not abs(wanted["a+b"] - wanted["a"]) > 1e-4:
            raise Wrong(f"training changed nothing: {wanted}")
        self.step = "export peft"
        self.run("export", "a+b", "--format", "peft", "--out", self.folder / "peft")
        self.close("exported adapter", self.peft_loss(base, self.folder / "peft"), wanted["a+b"])
        self.step = "export model"
        self.run("export", "a+b", "--format", "model", "--out", self.folder / "model")
        self.close("exported model", self.loss(self.load(self.folder / "model")), wanted["a+b"])
        self.step = "generate"
        prompts = [word for prompt in PROMPTS for word in ("-p", prompt)]
        answers = self.run("generate", "a+b", *prompts, "--raw", "--max-new-tokens", 6, may_refuse=True)
        model = self.load(self.folder / "model")
        for made in answers:
            self.like_plain(model, made)

    def close(self, what: str, found: float, wanted: float) -> None:
        gap = abs(found - wanted) / abs(wanted)
        if not gap <= LOOSE:
            raise Wrong(f"{what}: loss {found:.7f}, plain PEFT {wanted:.7f}, relative {gap:.1e}")

    # -- plain transformers and PEFT ------------------------------------------------------------------------------

    def load(self, folder: Path) -> Any:
        """As a person loads it: the causal class where that has weights for all of itself, else the class it is of."""
        from architectures import model_class
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        config = AutoConfig.from_pretrained(folder)
        whole = model_class(config)
        loaders = [AutoModelForCausalLM] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else []
        for loader in [*loaders, whole]:
            model, told = loader.from_pretrained(folder, output_loading_info=True)
            ignored = set() if type(model) is whole else {"unexpected_keys"}  # of a tower that is left out
            odd = {key: value for key, value in told.items() if value and key not in ignored}
            if not odd:
                return model.eval()
        raise Wrong(f"transformers loads {folder.name} with {odd}"[:300])

    def loss(self, model: Any) -> float:
        import torch
        from architectures import tiny_tokenizer
        from torch.nn import functional

        tokenizer = tiny_tokenizer()
        total, count = 0.0, 0
        with torch.no_grad():
            for record in RECORDS:
                ids = torch.tensor([[*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id]])
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                count += ids.shape[1] - 1
        return total / count

    def peft_loss(self, base: Path, adapter: Path) -> float:
        return self.loss(self.attach(self.load(base), {"first": adapter}))

    def attach(self, model: Any, adapters: dict[str, Path]) -> Any:
        """Plain PEFT with all of them live; what it complains of is wrong."""
        from peft import PeftModel

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (first, path), *others = adapters.items()
            peft = PeftModel.from_pretrained(model, path, adapter_name=first)
            for name, path in others:
                peft.load_adapter(path, adapter_name=name)
        for warning in told:
            if "missing adapter keys" in str(warning.message) or "unexpected" in str(warning.message):
                raise Wrong(f"PEFT: {str(warning.message)[:200]}")
        peft.base_model.set_adapter(list(adapters))
        return peft.eval()

    def plain_losses(self, base: Path) -> dict[str, float]:
        weights = self.folder / "registry/weights"
        a, b = weights / "a/1", weights / "b/1"
        losses = {"base": self.loss(self.load(base))}
        losses["a"] = self.loss(self.attach(self.load(base), {"first": a}))
        losses["a+b"] = self.loss(self.attach(self.load(base), {"first": a, "second": b}))
        return losses

    def like_plain(self, model: Any, made: dict[str, Any]) -> None:
        """The text is what transformers' own generate makes of the exported model and of that prompt alone."""
        import torch
        from architectures import tiny_tokenizer
        from transformers import GenerationConfig

        tokenizer = tiny_tokenizer()
        ids = torch.tensor([tokenizer(made["prompt"])["input_ids"]])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generation_config = GenerationConfig()  # the defaults of some suppress tokens
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        if made["text"] != text:
            raise Wrong(f"generated {made['text']!r}, transformers {text!r}")


def look_at(model_type: str) -> Finding:
    """What comes of a model type, in a process of its own that has a time limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, there))
    started = time.monotonic()
    process.start()
    there.close()
    try:
        finding: Finding = here.recv() if here.poll(_SECONDS) else Finding(model_type, "failed", "", "took too long")
    except EOFError:
        finding = Finding(model_type, "failed", "", "the process died")
    if process.is_alive():
        process.kill()
    process.join()
    return Finding(**{**asdict(finding), "seconds": round(time.monotonic() - started, 1)})


def _child(model_type: str, answer: Any) -> None:
    import torch

    torch.set_num_threads(1)
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="stackctl-architectures-", dir=place) as folder:
        os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = folder
        os.fsync = lambda _: None  # type: ignore[assignment]
        look = Look(model_type, Path(folder))
        finding = _outcome(look)
        os.chdir("/")
    answer.send(finding)


def _outcome(look: Look) -> Finding:
    try:
        look.do()
    except Refused as refused:
        return Finding(look.model_type, "refused", look.step, str(refused))
    except Exception as error:
        outcome = "unbuilt" if look.step == "build" else "failed"
        why = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error)[-2:])
        return Finding(look.model_type, outcome, look.step, why[-900:])
    return Finding(look.model_type, "right")


PAGE = Path(__file__).parents[2] / "docs/reference/architectures.md"
_HEAD = """# Architectures

Every kind of model that transformers {transformers} has for going on with a text, alone or inside a model that also
sees or hears. Written by `python -m tests.stress.architectures --write`, which builds a tiny random model of each and
takes it from `base add` over two trainings, one on top of the other, and both exports to `generate`. Right means: every
loss is that of plain PEFT {peft} with all adapters live, within 1e-5; what was exported is read back by PEFT and by
transformers to the same loss; the texts of prompts answered at once are what transformers generates of each alone.
"""


def page(findings: list[Finding]) -> str:
    """The reference page for what came of all types."""
    import peft
    import transformers

    parts = [_HEAD.format(transformers=transformers.__version__, peft=peft.__version__)]
    by_outcome = {
        name: [f for f in findings if f.outcome == name] for name in ("right", "refused", "failed", "unbuilt")
    }
    counts = ", ".join(f"{len(found)} {name}" for name, found in by_outcome.items())
    parts.append(f"{len(findings)} types: {counts}.\n")
    parts.append(f"## Right\n\n{_wrapped(f'`{f.model_type}`' for f in by_outcome['right'])}\n")
    for outcome, title, text in (
        ("refused", "Refused", "By `base add` or `train --dry-run`, or by `generate` alone, with exit code 4."),
        ("failed", "Failed", "Known not to work; a command ends with an error."),
        (
            "unbuilt",
            "Not looked at",
            "transformers itself makes nothing of a text here, or no tiny model could be built.",
        ),
    ):
        if found := by_outcome[outcome]:
            rows = "\n".join(f"| `{f.model_type}` | {_cell(f)} |" for f in found)
            parts.append(f"## {title}\n\n{text}\n\n| type | why |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)


def _wrapped(words: Iterable[str]) -> str:
    return textwrap.fill(", ".join(words), 118, break_long_words=False, break_on_hyphens=False)


def _cell(finding: Finding) -> str:
    why = finding.why.partition(" | hint:")[0].removeprefix("error: ").strip().splitlines()
    text = re.sub(r"/\S*/base\b|'tiny'", "it", why[-1] if finding.outcome == "unbuilt" else " ".join(why))
    text = re.sub(r"^\w+(Error|Wrong): ", "", text.strip()).replace("|", "\\|")
    text = re.sub(r", a \w+For\w+", "", text)  # the type says it
    return f"{finding.step}: {text}"[:100] if finding.outcome == "failed" else text[: 110 - len(finding.model_type)]


def architectures(budget: Budget) -> Outcome:
    """As many types as there is time for, in an order drawn by chance."""
    _import_all()
    from architectures import model_types

    types = model_types()
    budget.random.shuffle(types)
    findings = []
    while types and budget.is_left:
        findings.append(look_at(types.pop()))
    counts = Counter(finding.outcome for finding in findings)
    line = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    return Outcome(line, [f"{f.model_type}, {f.step}: {f.why}" for f in findings if f.outcome == "failed"])


def main(arguments: list[str] | None = None, tell: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.architectures", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--out", type=Path, help="a JSON file for all findings")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} of all types")
    options = parser.parse_args(arguments)
    _import_all()
    import architectures

    findings = []
    for model_type in options.types or architectures.model_types():
        findings.append(look_at(model_type))
        finding = findings[-1]
        tell(f"{finding.outcome:8} {model_type} ({finding.seconds}s) {finding.step}: {finding.why}".rstrip(" :"))
        sys.stdout.flush()
        if options.out:
            options.out.write_text(json.dumps([asdict(f) for f in findings], indent=1))
    if options.write and not options.types:
        PAGE.write_text(page(findings))
    counts = {name: sum(f.outcome == name for f in findings) for name in ("right", "refused", "failed", "unbuilt")}
    tell(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["failed"] else 0


def _import_all() -> None:
    """What every process needs, imported once before any is started."""
    warnings.filterwarnings("ignore")
    import peft  # noqa: F401
    import transformers

    import stackctl.cli
    import stackctl.engine.training  # noqa: F401

    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
