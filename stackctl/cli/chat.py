"""A chat on the terminal: what ``generate`` is without a prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stackctl.cli.prompt_options import say_what_rounding_costs
from stackctl.cli.shared_options import completions
from stackctl.core.errors import Incompatible, StackctlError, Usage, did_you_mean
from stackctl.core.expressions import BASE
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.render.output import Output
from stackctl.storage import atomic
from stackctl.storage.files import json_line
from stackctl.storage.paths import existing_path, typed_path

if TYPE_CHECKING:
    from stackctl.engine.generation import AnswerEngine, PrefixCache, Sampling

Message = dict[str, str]


@dataclass
class Chat:
    """A conversation with one stack at a time, all on one base that stays loaded."""

    registry: Registry
    output: Output
    stacked: AnswerEngine
    stack: ResolvedStack
    sampling: Sampling
    own_template: Any
    """The chat template of the base itself."""
    live: bool = False
    messages: list[Message] = field(default_factory=list)
    _prefix_cache: PrefixCache | None = None
    _left_out: int = 0
    _answers: int = 0

    @property
    def name(self) -> str:
        return self.stack.name or self.stack.text

    def run(self) -> None:
        """Talk until Ctrl-D or /exit. What goes wrong is said, and the chat goes on."""
        from stackctl.cli.line_editor import LineEditor

        editor = LineEditor(self.complete)
        say = self.output.status
        say(f"{self.name} on {self.stacked.base.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        if self.sampling.raw:
            say("with --raw each text is continued on its own, without the conversation before it")
        while True:
            try:
                line = editor.read(f"{self.name}> ")
            except KeyboardInterrupt:
                continue  # a line that is not wanted
            except EOFError:
                return
            try:
                if line.startswith("/"):
                    if self.command(line) is _LEAVE:
                        return
                elif line.strip():
                    self.ask(line)
            except StackctlError as error:
                self.output.error(error)
            except KeyboardInterrupt:
                say("stopped")

    # -- talking --------------------------------------------------------------------------------------------------

    def ask(self, line: str) -> str:
        """A message and its answer, as far as it comes: one that Ctrl-C stops stays as it is. Returns the answer."""
        self.messages.append({"role": "user", "content": line})
        heard: list[str] = []
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self._answer(line, heard)
        finally:
            text = "".join(heard)
            if text:
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.pop()
        if not text:
            self.output.status("there was no answer; the message was dropped")
        return text

    def _answer(self, line: str, heard: list[str]) -> None:
        from stackctl.engine.generation import PrefixCache, fit_conversation, generate_reply
        from stackctl.engine.records.prompt_files import Prompt

        if self.sampling.raw:
            prompt = Prompt(line)
        else:
            kept = fit_conversation(self.stacked, self.messages, self.sampling)
            self._say_left_out(len(self.messages) - len(kept))
            prompt = Prompt(line, kept)
        sampling = self.sampling
        if sampling.seed is not None:  # each answer of a chat is another draw
            sampling = replace(sampling, seed=sampling.seed + self._answers)
        self._answers += 1
        self._prefix_cache = self._prefix_cache or PrefixCache()

        def hear(piece: str) -> None:
            heard.append(piece)
            self.output.speech(piece)

        try:
            answer = generate_reply(self.stacked, prompt, sampling, hear, self._prefix_cache)
        finally:
            if heard:
                self.output.text("\n")
        if answer.stop == "length":
            self.output.status(f"cut at {answer.new_tokens} tokens; --max-new-tokens sets the longest answer")

    def _say_left_out(self, count: int) -> None:
        if count > self._left_out:
            self.output.note(f"the conversation is longer than the context: the oldest {count} messages are not read")
        self._left_out = count

    # -- commands -------------------------------------------------------------------------------------------------

    def command(self, line: str) -> object:
        """Do what a line that begins with a slash says.

        Raises:
            StackctlError: there is no such command, or it could not be done.
        """
        name, _, rest = line.partition(" ")
        if name not in _COMMANDS:
            raise Usage(
                f"there is no command {name}",
                hint=did_you_mean(name, list(_COMMANDS), "/help lists them; a space before it sends it as text"),
            )
        return _COMMANDS[name].run(self, rest.strip())

    def reset(self, _: str) -> None:
        self.messages.clear()
        self._left_out = 0
        self._prefix_cache = None
        self.output.status("the conversation was cleared")

    def system(self, text: str) -> None:
        if self.sampling.raw and text:
            raise Usage("with --raw there is no system message", hint="begin the chat without --raw")
        self.sampling = replace(self.sampling, system=text or None)
        self.output.status("the system message is set" if text else "there is no system message now")

    def use(self, expression: str) -> None:
        """Another stack on the same base; the one in use stays when anything is wrong with it."""
        if not expression:
            self.output.status(f"{self.stack.pinned} on {self.stacked.base.name}")
            return
        stack = resolve_expression(
            self.registry, expression, base=self.stacked.base.name if expression == BASE else None
        )
        if stack.base.name != self.stacked.base.name:
            raise Incompatible(
                f"'{expression}' has the base '{stack.base.name}', and this chat runs on '{self.stacked.base.name}'",
                hint=f"stackctl generate {expression}",
            )
        plan = read_plan(self.registry, stack).check()
        check_digests(self.registry, stack.members)
        from stackctl.engine.data.chat_template import choose_chat_template

        tokenizer = self.stacked.tokenizer
        before, template = self.stacked.plan, tokenizer.chat_template
        try:
            tokenizer.chat_template = self.own_template
            if note := choose_chat_template(tokenizer, stack.base.name, plan, raw=self.sampling.raw):
                self.output.note(note)
            self.stacked.use(plan, live=self.live)
        except BaseException:
            tokenizer.chat_template = template
            if before is not None and self.stacked.plan is not before:
                self.stacked.use(before, live=self.live)
            raise
        self.stack = stack
        say_what_rounding_costs(self.stacked, self.output)
        for note in stack.notes:
            self.output.note(note)
        self.output.status(f"now {stack.pinned}")

    def save(self, text: str) -> None:
        """The conversation as one more record of a file that ``train --data`` reads."""
        path = typed_path(text)
        if path.suffix.lower() != ".jsonl":
            raise Usage("/save writes JSON Lines", hint="/save chat.jsonl")
        if not self.messages:
            raise Usage("the conversation is empty", hint="/save comes after an answer")
        existing_path(path.absolute().parent, "the folder")
        system = [{"role": "system", "content": self.sampling.system}] if self.sampling.system else []
        record = json_line({"messages": [*system, *self.messages]}) + "\n"
        known = path.read_bytes() if path.exists() else b""
        atomic.write_output(path, known + (b"\n" if known and not known.endswith(b"\n") else b"") + record.encode())
        self.output.status(f"{'added to' if known else 'saved as'} {path}: train --data reads it")

    def undo(self, _: str) -> None:
        self._take_back()
        self.output.status("the last message and its answer were removed")

    def retry(self, _: str) -> None:
        question, before = self._take_back()
        if self.ask(question) == before and self.sampling.greedy:
            self.output.note("the answer is the same: without --temperature decoding is greedy")

    def _take_back(self) -> tuple[str, str]:
        """The last question and its answer, which are forgotten."""
        if not self.messages:
            raise Usage("the conversation is empty", hint="type a message")
        answer, question = self.messages.pop(), self.messages.pop()
        return question["content"], answer["content"]

    def help(self, _: str) -> None:
        lines = {f"{name} {command.argument}": command.what for name, command in _COMMANDS.items()}
        lines["Alt-Enter, or \\ at the end"] = "another line"
        for typed, what in lines.items():
            self.output.status(f"{typed.ljust(max(map(len, lines)))}  {what}")

    def leave(self, _: str) -> object:
        return _LEAVE

    # -- completion -----------------------------------------------------------------------------------------------

    def complete(self, text: str) -> Iterator[tuple[str, str]]:
        """Commands, and behind /use what can be used."""
        name, space, rest = text.partition(" ")
        if not space:
            if text.startswith("/"):
                yield from ((text, f"{known} " if c.argument else known) for known, c in _COMMANDS.items()
                            if known.startswith(text))  # fmt: skip
        elif name == "/use":
            yield from ((rest, found) for found in completions(self.registry, rest, "adapters", "stacks"))


@dataclass(frozen=True)
class _Command:
    run: Callable[[Chat, str], object]
    argument: str
    what: str


_LEAVE = object()
_COMMANDS = {
    "/use": _Command(Chat.use, "EXPR", "switch to another stack on the same base; without EXPR: show the one in use"),
    "/system": _Command(Chat.system, "TEXT", "set the system message; without TEXT: remove it"),
    "/retry": _Command(Chat.retry, "", "answer the last message again"),
    "/undo": _Command(Chat.undo, "", "remove the last message and its answer"),
    "/reset": _Command(Chat.reset, "", "clear the conversation"),
    "/save": _Command(Chat.save, "FILE", "add the conversation to a .jsonl file, a record to train on"),
    "/help": _Command(Chat.help, "", "this list"),
    "/exit": _Command(Chat.leave, "", "leave, as Ctrl-D does"),
}
