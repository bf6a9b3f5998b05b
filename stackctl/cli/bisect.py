"""stackctl bisect"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.bisect_report import culprit_notes, culprit_screen, culprits_json
from stackctl.cli.command import INSPECT, Context, command
from stackctl.cli.engines import BaseOptions
from stackctl.cli.load_stacks import DATA, load_common_base, read_sets
from stackctl.cli.prompt_options import RAW, SYSTEM, idle_with_raw, of_output
from stackctl.cli.shared_options import TemplateOptions, What, typed_text
from stackctl.core.errors import Failed, StackctlError, Usage, attempt, gathering, raise_all
from stackctl.core.template_arguments import Arguments
from stackctl.plan.bisection import Found, Off, StackPart, find_culprits, parts_of, weights_without
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.planning import plan_expression
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.stacks import check_stack_name, save_stack
from stackctl.render.output import Result

if TYPE_CHECKING:
    from stackctl.engine.evaluation.probes import Probe
    from stackctl.engine.evaluation.scoring import DataSet
    from stackctl.engine.generation import Sampling
    from stackctl.engine.models import StackedModel

_of_answer = partial(typer.Option, rich_help_panel="A bad answer")
_LONGEST = 64
_NO_CULPRIT = "no member of a stack on it is the culprit"
_EXAMPLES = """\
stackctl bisect storyteller --data heldout.jsonl
stackctl bisect style+instruct+tone -p "Tell me about the sea." --bad "the the the" --name mended
stackctl bisect storyteller -p "Tell me about the sea." --bad "the the the\""""


@dataclass(frozen=True)
class _Symptom(TemplateOptions):
    """What is bad: a text in the answer to a prompt, or losses. Each field is an option, with its help."""

    prompt: Annotated[
        str | None,
        _of_answer("--prompt", "-p", parser=typed_text, help="A prompt whose answer is bad.", metavar="TEXT"),
    ] = None
    bad: Annotated[
        str | None, _of_answer(parser=typed_text, help="With -p: a text in the greedy answer that makes it bad.")
    ] = None
    raw: RAW = False
    system: SYSTEM = None
    max_new_tokens: Annotated[
        int | None, of_output(min=1, help="Longest answer in tokens.", show_default=str(_LONGEST))
    ] = None
    data: DATA = None
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="With --data: longest record in tokens; what is longer is cut.", show_default="1024"),
    ] = None

    @property
    def longest(self) -> int:
        return self.max_new_tokens or _LONGEST

    def problems(self) -> Iterator[Usage]:
        """Everything that is missing or too much."""
        example = 'stackctl bisect WHAT -p "…" --bad "…", or: stackctl bisect WHAT --data heldout.jsonl'
        if self.prompt is None and not self.data:
            yield Usage("nothing says what is bad", hint=example)
        if self.prompt is not None and self.data:
            yield Usage("-p and --data are two ways to say what is bad", hint="give one of them")
        if self.prompt is not None and not self.prompt.strip():
            yield Usage("the prompt is empty", hint=example)
        if self.prompt is not None and self.bad is None:
            yield Usage("-p needs a text that makes the answer bad", hint='name one: --bad "…"')
        if self.bad is not None and not self.bad.strip():
            yield Usage("--bad is empty, and every answer holds that", hint='name a text: --bad "…"')
        if self.prompt is not None:
            yield from idle_with_raw(
                self.raw,
                {"--system": self.system, "--chat-template-kwargs": self.chat_template_kwargs,
                 "--enable-thinking": self.enable_thinking},
            )  # fmt: skip
        if self.prompt is None:
            given = {"--bad": self.bad is not None, "--raw": self.raw, "--system": self.system is not None,
                     "--max-new-tokens": self.max_new_tokens is not None}  # fmt: skip
            if idle := [name for name, is_given in given.items() if is_given]:
                yield Usage(f"{', '.join(idle)} applies to a prompt, and none was given", hint='give -p "…"')
        if not self.data and self.max_length is not None:
            yield Usage("--max-length applies to --data, and none was given", hint="leave it out")

    def sampling(self) -> Sampling:
        from stackctl.engine.generation import Sampling

        return Sampling(self.longest, raw=self.raw, system=self.system, template=self.template())


@command("bisect", example=_EXAMPLES, panel=INSPECT)
def bisect(
    context: Context,
    what: What = None,
    *,
    symptom: _Symptom,
    name: Annotated[
        str | None, typer.Option(help="Write the stack without the culprit, exactly, under this name.")
    ] = None,
    loading: BaseOptions,
) -> Result:
    """Find the member, the layers and the module that make a stack go wrong, by switching parts off in halves.

    Bad is a text in the answer to a prompt, or with --data a loss that is higher than without one of the members, or
    than that of the base alone.
    """
    registry = context.registry
    problems: list[StackctlError] = [*symptom.problems()]
    template: Arguments = attempt(problems, symptom.template) or {}
    sets: list[DataSet] = []
    with gathering(problems):
        planned = stack, plan = plan_expression(registry, what, base=loading.base)
        if not parts_of(plan):
            raise Usage(
                f"'{stack.text}' changes nothing of its base: there is nothing to switch off", hint="name a stack"
            )
        if name is not None:
            check_stack_name(registry, name, stack)
        if symptom.data:
            sets = read_sets(context, planned, symptom.data, symptom.max_length or 1024, template)
    raise_all(problems)
    stacked = load_common_base(context, [planned], loading.dtype, loading.device)
    probe = _probe(context, stacked, plan, symptom, sets)
    found = _search(context, stack, plan, probe, symptom)
    typed = name or _typed_without(stack, plan, found.parts, probe)
    if name is not None:
        save_stack(registry, name, stack_without(stack, plan, found.parts))
    culprits = culprits_json(plan, found.parts)
    document = {
        "stack": stack.text,
        "base": stack.base.name,
        "culprit": culprits[0],
        "culprits": culprits,
        "evaluations": found.evaluations,
        "without": typed,
        "results": {
            what: probe.describe(frozenset(off))
            for what, off in (("stack", ()), ("base", parts_of(plan)), ("without", found.parts))
        },
    }
    notes = (*stack.notes, *culprit_notes(document, name))
    return Result(document, typed or culprits[0]["member"], lambda: culprit_screen(document, name), notes=notes)


def _probe(
    context: Context, stacked: StackedModel, plan: StackPlan, symptom: _Symptom, sets: Sequence[DataSet]
) -> Probe:
    from stackctl.engine.evaluation.probes import LossProbe, TextProbe
    from stackctl.engine.records.prompt_files import Prompt

    context.output.status("looking at the stack as it is and at the base alone")
    if symptom.prompt is None:
        return LossProbe(stacked, plan, sets)
    return TextProbe(stacked, plan, Prompt(symptom.prompt, place="the prompt"), symptom.bad or "", symptom.sampling())


def _search(context: Context, stack: ResolvedStack, plan: StackPlan, probe: Probe, symptom: _Symptom) -> Found:
    """The culprits.

    Raises:
        Failed: the stack is not bad, or its base alone is.
    """
    whole, parts = frozenset[StackPart](), parts_of(plan)
    if symptom.prompt is not None:
        _check_answers(stack, symptom, probe.describe(whole), probe.describe(frozenset(parts)))
    with context.output.progress() as progress:
        task = progress.add_task("bisecting", total=None)
        found = find_culprits(parts, _Counted(probe, lambda: progress.advance(task)))
        if symptom.prompt is not None and (not found.parts or probe.describe(frozenset(found.parts))["bad"]):
            probe.by_text = True  # how likely the text is there says nothing, or it is written elsewhere
            again = find_culprits(parts, _Counted(probe, lambda: progress.advance(task)))
            found = Found(again.parts, found.evaluations + again.evaluations)
    if not found.parts:
        loss, base = probe.score(whole), probe.score(frozenset(parts))
        seen = f"its loss is {loss:.4f}, that of the base '{stack.base.name}' alone {base:.4f}"
        if not math.isfinite(loss):
            raise Failed(f"the base '{stack.base.name}' alone is already bad: its loss is not finite", hint=_NO_CULPRIT)
        raise Failed(
            f"'{stack.text}' is not bad on these records: {seen}, and no member makes it worse by more than noise",
            hint="to see what each member adds: stackctl compose EXPR --sweep NAME=0:1:1 --data FILE",
        )
    return found


def _check_answers(stack: ResolvedStack, symptom: _Symptom, own: dict[str, Any], base: dict[str, Any]) -> None:
    if not own["bad"]:
        raise Failed(
            f"the answer of '{stack.text}' does not hold {symptom.bad!r} within {symptom.longest} tokens: "
            f"{own['text'].strip()[:200]!r}",
            hint="name a text that is in it, or a larger --max-new-tokens",
        )
    if base["bad"]:
        raise Failed(
            f"the base '{stack.base.name}' alone is already bad: it answers {base['text'].strip()[:200]!r}",
            hint=_NO_CULPRIT,
        )


@dataclass(frozen=True)
class _Counted:
    """A probe that says when it has looked."""

    probe: Probe
    step: Callable[[], None]

    def score(self, off: Off) -> float:
        found = self.probe.score(off)
        self.step()
        return found

    def threshold(self, off: Off) -> float | None:
        return self.probe.threshold(off)


def _typed_without(stack: ResolvedStack, plan: StackPlan, parts: Sequence[StackPart], probe: Probe) -> str | None:
    """The expression without the culprits' members, which leaves out more than they, if it is good; else None."""
    gone = {part.member for part in parts}
    kept = replace(stack, members=tuple(m for n, m in enumerate(stack.members) if n not in gone))
    if kept.typed is None:
        return None
    off = frozenset(part for part in parts_of(plan) if part.member in gone)
    return None if probe.describe(off)["bad"] else kept.typed


def stack_without(stack: ResolvedStack, plan: StackPlan, parts: Sequence[StackPart]) -> ResolvedStack:
    """The stack in which some parts have the weight zero; a member of which nothing is left is left out."""
    members = []
    for member, weights in zip(stack.members, weights_without(plan, parts), strict=True):
        members.append(replace(member, weight=weights.weight, layer_weights=weights.by_name))
    kept = tuple(m for m in members if m.weight or any(m.layer_weights.values()))
    return replace(stack, members=kept or tuple(members))
