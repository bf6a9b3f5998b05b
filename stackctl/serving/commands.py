"""What to type to serve a stack with vLLM, llama.cpp or Ollama, true for that very stack. Entries and headers only.

Options checked with vLLM 0.32 (``vllm serve --help``) and llama.cpp (``llama-server --help``); what each program would
reject is :mod:`stackctl.plan.lint`'.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.schema import Base
from stackctl.plan.lint import gguf_file_name, lint_for, vllm_max_rank
from stackctl.plan.stack_plan import Problem, StackPlan
from stackctl.registry.base_models import base_gguf, converted_folder
from stackctl.registry.resolve import ResolvedStack

TITLES = {"vllm": "vLLM", "gguf": "llama.cpp", "ollama": "Ollama"}
"""The targets of ``inspect --for`` as people call them."""


@dataclass(frozen=True, slots=True)
class ServeCommands:
    """How one program serves a stack: the lines to type, in order; none where ``problems`` has an error."""

    lines: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    def json(self) -> dict[str, Any]:
        return {"lines": list(self.lines), "notes": list(self.notes), "problems": [p.json() for p in self.problems]}


def serve_commands(
    stack: ResolvedStack, plan: StackPlan, root: Path, *, named: bool = False
) -> dict[str, ServeCommands]:
    """Per target how to serve a stack of the registry in ``root``; ``named``: the lines have to say where that is.

    Raises:
        NotFound: the file that the base came from is gone.
    """
    export = ["stackctl", "export", stack.name or stack.expression, *(["--registry", str(root)] if named else [])]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stack.name or stack.default_name).strip("-.")
    made = {"vllm": _vllm, "gguf": _llama_cpp, "ollama": _ollama}
    recipes = {}
    for target, recipe in made.items():
        problems = [*plan.errors, *lint_for(target, plan)]
        if not plan.errors and not plan.modules:
            problems.append(
                Problem("nothing", f"{plan.expression} adds nothing to the base: there is nothing to serve")
            )
        if any(problem.severity == "error" for problem in problems):
            recipes[target] = ServeCommands((), (), tuple(problems))
            continue
        lines, notes = recipe(export, name, plan, root)
        said = tuple(p for p in problems if p.code != "vllm_rank")  # which the line heeds
        recipes[target] = ServeCommands(tuple(shlex.join(line) for line in lines), tuple(notes), said)
    return recipes


_Told = tuple[list[list[str]], list[str]]
"""Lines as words, and notes."""


def vllm_base(base: Base, root: Path) -> tuple[list[str], list[str]]:
    """The words that name a base to vLLM, the model and then options, and notes."""
    words, notes = [base.source], []
    if base.kind != "hub":
        gguf = base_gguf(base, root)
        folder = converted_folder(gguf) if gguf else (root / (base.path or base.source)).resolve()
        words = [str(folder)]
        if not folder.is_dir():
            notes.append(f"{folder} is not there; the first command that runs the base makes it")
    elif base.revision:
        words += ["--revision", base.revision]
    if base.dtype == "float32":  # which vLLM would run in half precision
        words += ["--dtype", "float32"]
    return words, notes


def _vllm(export: list[str], name: str, plan: StackPlan, root: Path) -> _Told:
    base, out = plan.known_base, _free(f"{name}-peft")
    (model, *options), missing = vllm_base(base, root)
    serve = ["vllm", "serve", model, "--enable-lora", "--lora-modules", f"{name}={out}"]
    serve += ["--max-lora-rank", str(vllm_max_rank(plan.rank)), *options]
    notes = [f"ask for the model '{name}'; it listens on every network interface unless --host says otherwise"]
    notes += missing
    whole = ["--whole-class"] if base.whole is not None else []
    return [[*export, "--format", "peft", *whole, "--out", out], serve], notes


def _llama_cpp(export: list[str], name: str, plan: StackPlan, root: Path) -> _Told:
    base, out = plan.known_base, _free(f"{name}-gguf")
    adapter = f"{out}/{gguf_file_name(Path(out))}"
    gguf = base_gguf(base, root)
    notes = [f"--lora-scaled {adapter}:0.5 instead of --lora halves the whole stack"]
    if gguf is None:
        source = "--remote " + base.source if base.kind == "hub" else str((root / (base.path or base.source)).resolve())
        made = shlex.quote(f"{base.name}.gguf")
        notes.insert(0, f"{made} has to be made first: llama.cpp's convert_hf_to_gguf.py {source} --outfile {made}")
    else:
        notes.append("stackctl runs the base in float32; where the file is quantised, texts may differ")
    serve = ["llama-server", "-m", str(gguf or f"{base.name}.gguf"), "--lora", adapter]
    return [[*export, "--format", "gguf", "--out", out], serve], notes


def _ollama(export: list[str], name: str, plan: StackPlan, root: Path) -> _Told:
    out = _free(f"{name}-ollama")
    return [
        [*export, "--format", "gguf", "--modelfile", "--out", out],
        ["ollama", "create", name, "-f", f"{out}/Modelfile"],
        ["ollama", "run", name],
    ], []


def _free(name: str) -> str:
    """A folder's name that is not taken in the working directory, so that the export can make it."""
    taken, number = name, 2
    while Path(name).exists():
        name, number = f"{taken}-{number}", number + 1
    return name
