"""Templates of published reasoning and tool models, by what they do to a turn of the assistant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from chat_tokenizers import REASONING, USER, encoded, text_of, turns, with_template

from stackctl.core.errors import Usage
from stackctl.engine.records.types import ChatRecord

THOUGHT = {"role": "assistant", "content": "<think>R</think>yes"}
WANTED = {
    "DeepSeek-V3.1": ("[A]<think>", "R</think>yes<|im_end|>", "[A]</think>", "yes<|im_end|>"),
    "EXAONE-4": ("<think>\n", "R</think>yes<|im_end|>", "<think>\n\n</think>\n\n", "yes<|im_end|>"),
    "GLM-Z1": ("<think>\n", "R</think>yes<|im_end|>", "<think>\n", "\n</think>\n\nyes<|im_end|>"),
    "GLM-5": ("[A]<think>", "R</think>yes<|im_end|>", "[A]<think>", "</think>yes<|im_end|>"),
    "Kimi-K2-Thinking": ("[A]", "<think>R</think>yes<|im_end|>", "[A]", "<think></think>yes<|im_end|>"),
    "no key": ("[A]", "<think>R</think>yes<|im_end|>", "[A]", "<think></think>yes<|im_end|>"),
    "stripped": ("[A]", "<think>R</think>yes<|im_end|>", "[A]", "yes<|im_end|>"),
}
"""Of a turn with a thought and of one without: the prompt's end, and what is learned."""


@pytest.mark.parametrize("name", REASONING)
def test_what_is_learned_of_a_turn(name: str, smollm2: Any) -> None:
    tokenizer = with_template(copy.deepcopy(smollm2), REASONING[name])
    plain = {"role": "assistant", "content": "yes"}
    for turn, prompt, written in ((THOUGHT, *WANTED[name][:2]), (plain, *WANTED[name][2:])):
        (example,) = encoded(tokenizer, ChatRecord(1, [USER, turn])).examples
        assert turns(tokenizer, example) == [written]
        assert (
            text_of(tokenizer, example) == f"[U]q{'' if prompt.startswith('[A]') else '[A]' + chr(10)}{prompt}{written}"
        )


@pytest.mark.parametrize(
    "answer",
    [
        "Write </think> to end it.",
        "<reasoning>R</reasoning><answer>yes</answer>",
        "Say <think> or </think>, as you like.",
    ],
)
def test_tags_that_are_words_of_an_answer_stay_there(answer: str, smollm2: Any) -> None:
    tokenizer = with_template(copy.deepcopy(smollm2), REASONING["GLM-5"])
    (example,) = encoded(tokenizer, ChatRecord(1, [USER, {"role": "assistant", "content": answer}])).examples
    assert turns(tokenizer, example) == [f"</think>{answer}<|im_end|>"]


def test_the_end_of_turn_ends_what_is_learned(smollm2: Any) -> None:
    """As Command-R7B's template for tools, which begins the next turn behind every turn."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' if loop.first }}<|{{ m.role }}|>{{ m.content }}<|im_end|><|im_start|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = with_template(copy.deepcopy(smollm2), template)
    messages = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    found = encoded(tokenizer, ChatRecord(1, messages))
    assert [turn for example in found.examples for turn in turns(tokenizer, example)] == ["a<|im_end|>", "b<|im_end|>"]


def test_contents_that_a_template_takes_as_parts_only(smollm2: Any) -> None:
    """As MiniMax-M1's."""
    template = "{% for m in messages %}[{{ m.role }}]{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    template += "{{ p.text }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = with_template(copy.deepcopy(smollm2), template)
    (example,) = encoded(tokenizer, ChatRecord(1, [USER, {"role": "assistant", "content": "yes"}])).examples
    assert text_of(tokenizer, example) == "[user]q<|im_end|>[assistant]yes<|im_end|>"
    assert turns(tokenizer, example) == ["yes<|im_end|>"]


def test_what_a_template_shows_nothing_of_is_said_or_refused_with_its_line(smollm2: Any) -> None:
    template = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}<|im_end|>"
    template += "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = with_template(copy.deepcopy(smollm2), template)
    yes = {"role": "assistant", "content": "yes"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    records = [
        ChatRecord(1, [{"role": role, "content": "Be brief."}, USER, yes]) for role in ("system", "developer", "tool")
    ]
    found = encoded(tokenizer, *records, ChatRecord(4, [USER, yes], tools=[{"name": "f"}]))
    assert sorted(found.notes) == [
        "the chat template shows nothing of 'tools': 1 of 4 conversations",
        "the chat template shows nothing of turns of the role 'developer': 1 of 4 conversations",
        "the chat template shows nothing of turns of the role 'system': 1 of 4 conversations",
        "the chat template shows nothing of turns of the role 'tool': 1 of 4 conversations",
    ]
    with pytest.raises(Usage, match="line 7: it shows nothing of the tool_calls of message 2"):
        encoded(tokenizer, ChatRecord(7, [USER, {**yes, "tool_calls": [call]}]))


def test_calls_without_an_id_are_numbered_for_a_template_that_wants_one(smollm2: Any) -> None:
    """As Mistral's, whose ids have nine characters."""
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
        "{{ raise_exception('ids of nine') }}{% endif %}[CALL]{{ c.function | tojson }}{{ c.id }}{% endfor %}<|im_end|>"
        "{% elif m.role == 'tool' %}[RESULT {{ m.tool_call_id }}]{{ m.content }}{% else %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(copy.deepcopy(smollm2), template)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "yes"},
    ]
    found = encoded(tokenizer, ChatRecord(1, messages))
    (example,) = found.examples
    assert turns(tokenizer, example) == [
        '[CALL]{"name": "f", "arguments": {"a": 1}}call00001<|im_end|>',
        "[assistant]yes<|im_end|>",
    ]
    assert "[RESULT call00001]12" in text_of(tokenizer, example)
    assert "the chat template wants an id for each call: they are numbered: 1 of 1 conversations" in found.notes
