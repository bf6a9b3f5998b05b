"""Conversations through chat templates that change, strip, refuse or lack something."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from chat_tokenizers import (
    GEMMA,
    LLAMA2,
    MISTRAL,
    PHI3,
    PLAIN,
    QWEN3,
    USER,
    byte_level,
    chat,
    encoded,
    record_set,
    sentencepiece_like,
    text_of,
    turns,
    with_template,
)
from tokenizers import AddedToken

from stackctl.core.errors import Usage
from stackctl.engine.data.chat_template import CHATML, ensure_chat_template
from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import EncodeOptions
from stackctl.engine.data.turns import end_of_turn
from stackctl.engine.records.types import ChatRecord


def test_qwen3_changes_earlier_turns_so_each_turn_is_an_example(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, QWEN3)
    thought = "<think>\nhm\n</think>\n\n"
    found = encoded(tokenizer, chat("1?", f"{thought}one", "2?", f"{thought}two"), chat("3?", "three", number=2))
    assert [turns(tokenizer, example) for example in found.examples] == [
        [f"{thought}one<|im_end|>"],
        [f"{thought}two<|im_end|>"],
        ["<think>\n\n</think>\n\nthree<|im_end|>"],  # what generation has to write after its prompt
    ]
    assert "<think>" not in text_of(tokenizer, found.examples[1]).split("two")[0].split("2?")[0]
    several, added = found.notes
    assert "1 of 2 conversations became one example per turn" in several
    assert "'<think>\\n\\n</think>' before an answer: it is learned: 1 of 2 conversations" in added


def test_qwen3_turns_that_do_not_change_share_an_example(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, QWEN3)
    thought = "<think>\nhm\n</think>\n\n"
    assistant = [{"role": "assistant", "content": f"{thought}{word}"} for word in ("call", "answer")]
    record = ChatRecord(1, [USER, assistant[0], {"role": "tool", "content": "42"}, assistant[1]])
    found = encoded(tokenizer, record)
    assert [turns(tokenizer, e) for e in found.examples] == [[f"{thought}call<|im_end|>", f"{thought}answer<|im_end|>"]]
    assert found.notes == []


@pytest.mark.parametrize("template", [CHATML, PHI3, QWEN3], ids=["chatml", "phi3", "qwen3"])
@pytest.mark.parametrize("more", [(), ("Hi.", "Yes?")], ids=["alone", "goes on"])
def test_a_conversation_that_the_assistant_begins(smollm2: Any, template: str, more: tuple[str, ...]) -> None:
    """Of a greeting alone it was said that the template refuses an empty conversation."""
    tokenizer = with_template(smollm2, template)
    roles = ("assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("Welcome!", *more), strict=False)]
    found = encoded(tokenizer, ChatRecord(1, messages))
    learned = [text for example in found.examples for text in turns(tokenizer, example)]
    assert [text.partition("<|")[0].removeprefix("<think>\n\n</think>\n\n") for text in learned] == [
        "Welcome!", *more[1:]
    ]  # fmt: skip
    assert all(text.endswith(("<|im_end|>", "<|end|>")) for text in learned)


def test_gemma_strips_contents(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, GEMMA)
    (example,) = encoded(tokenizer, chat("Hi ", "  yes \n", "?", "no")).examples
    assert turns(tokenizer, example) == ["yes<end_of_turn>", "no<end_of_turn>"]


def test_gemma_and_mistral_refusals_name_the_lines(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, GEMMA)
    twice = ChatRecord(3, [USER, USER, {"role": "assistant", "content": "a"}])
    with pytest.raises(Usage) as caught:
        encoded(tokenizer, chat("q", "a"), chat("q", "a", system="s", number=2), twice)
    assert "line 2: System role not supported; line 3: Conversation roles must alternate" in caught.value.message
    with pytest.raises(Usage, match="record 3: roles must alternate"):
        encode(record_set(twice, unit="record"), with_template(smollm2, MISTRAL), EncodeOptions(64))


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_llama2_without_generation_prompt(kind: str, smollm2: Any) -> None:
    tokenizer = with_template(sentencepiece_like() if kind == "sentencepiece" else smollm2, LLAMA2)
    eos = tokenizer.eos_token
    (example,) = encoded(tokenizer, chat("Hi", " Hello ", "Hi", "yes it is")).examples
    found = [turn.lstrip(" ") for turn in turns(tokenizer, example)]  # SentencePiece decodes without the first space
    assert found == [f"Hello {eos}", f"yes it is {eos}"]
    assert turns(smollm2, encoded(with_template(smollm2, LLAMA2), chat("Hi", "Hello")).examples[0]) == [
        " Hello <|im_end|>"
    ]


def test_mistral_puts_the_system_message_where_inference_sees_it(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, MISTRAL)
    found = encoded(tokenizer, chat("q1", "a1", "q2", "a2", system="S."))
    assert [text_of(tokenizer, example) for example in found.examples] == [
        "<|im_start|>[INST] S.\n\nq1[/INST] a1<|im_end|>",
        "<|im_start|>[INST] q1[/INST] a1<|im_end|>[INST] S.\n\nq2[/INST] a2<|im_end|>",
    ]
    assert [turns(tokenizer, example) for example in found.examples] == [[" a1<|im_end|>"], [" a2<|im_end|>"]]
    assert len(found.notes) == 2
    without = encoded(tokenizer, chat("q1", "a1", "q2", "a2"))
    assert [turns(tokenizer, example) for example in without.examples] == [[" a1<|im_end|>", " a2<|im_end|>"]]
    assert without.notes == []


def test_a_template_without_an_end_of_turn_ends_with_eos(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, PLAIN)
    assert end_of_turn(tokenizer) == ""
    first, second = encoded(tokenizer, chat("Hi", "one", "Hi", "two")).examples
    assert text_of(tokenizer, first) == "user: Hi\nassistant: one<|im_end|>"
    assert text_of(tokenizer, second) == "user: Hi\nassistant: one\nuser: Hi\nassistant: two<|im_end|>"
    assert [turns(tokenizer, example) for example in (first, second)] == [[" one<|im_end|>"], [" two<|im_end|>"]]


def test_an_end_of_turn_token_that_swallows_the_newline_is_supervised(smollm2: Any) -> None:
    """As Phi-3's ``<|end|>``, which is declared with rstrip."""
    tokenizer = copy.deepcopy(smollm2)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    with_template(tokenizer, CHATML.replace("<|im_end|>", "<|end|>"))
    (example,) = encoded(tokenizer, chat("a", "b", "c", "d")).examples
    assert turns(tokenizer, example) == ["b<|end|>", "d<|end|>"]


def test_what_closes_a_whole_conversation_belongs_to_no_turn(smollm2: Any) -> None:
    """Phi-3's template ends each turn with its own token, and puts EOS behind the last one."""
    tokenizer = copy.deepcopy(smollm2)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)], special_tokens=True)
    with_template(tokenizer, PHI3)
    assert end_of_turn(tokenizer) == "<|end|>", "where generation stops"
    found = encoded(tokenizer, chat("a", "b", "c", "d"))
    (example,) = found.examples
    assert (
        text_of(tokenizer, example)
        == "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\nd<|end|>"
    )
    assert turns(tokenizer, example) == ["b<|end|>", "d<|end|>"]
    assert found.notes == []


SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% for m in messages if m.role == 'system' %}SYSTEM{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("system", ["{{ '<|system|>' + m.content + '<|end|>\n' }}", "Rule: {{ m.content }}", "FOOT"])
@pytest.mark.parametrize(
    ("change", "end"),
    [
        (lambda text: text, "<|end|>"),
        (lambda text: text.partition("{% if add")[0], "<|end|>"),
        (lambda text: text.replace("'<|end|>\n'", "eos_token"), "<|im_end|>"),
        (lambda text: text.replace(" + '<|end|>\n'", ""), "<|im_end|>"),
    ],
    ids=["plain", "no generation prompt", "eos", "no end"],
)
def test_what_a_template_puts_behind_an_answer_is_not_learned(
    smollm2: Any, system: str, change: Callable[[str], str], end: str
) -> None:
    """The system text, or a word of its own, behind all turns."""
    tokenizer = with_template(smollm2, change(SYSTEM_LAST.replace("SYSTEM", system)))
    for said in ("Be brief.", "Say yes or no.", "yes"):
        found = encoded(
            tokenizer, ChatRecord(1, [{"role": "system", "content": said}, *chat("Hi", "yes", "Well?", "no").messages])
        )
        learned = [text for example in found.examples for text in turns(tokenizer, example)]
        assert [text.removeprefix("<|assistant|>") for text in learned] == [f"yes{end}", f"no{end}"], said


def test_a_content_that_a_template_changes_is_learned_as_it_is_shown(smollm2: Any) -> None:
    """It was said to be dropped."""
    tokenizer = with_template(
        smollm2, SYSTEM_LAST.replace("SYSTEM", "").replace("m.content", "m.content|replace('&', 'and')")
    )
    found = encoded(tokenizer, chat("a & b", "c & d"))
    assert [turns(tokenizer, example) for example in found.examples] == [["c and d<|end|>"]]
    assert found.notes == [
        "the chat template changes the content of a turn: it is learned as it is shown: 1 of 1 conversations"
    ]


@pytest.mark.parametrize("foot", ["<|done|>", "\n[END OF TALK]\n", "{{ eos_token }}Made on a Monday."])
def test_what_a_template_puts_behind_a_whole_conversation_is_not_learned(smollm2: Any, foot: str) -> None:
    for foot_only_when_finished in (foot, "{% if not add_generation_prompt %}" + foot + "{% endif %}"):
        tokenizer = with_template(
            smollm2,
            SYSTEM_LAST.partition("{% for m in messages if m.role == 'system'")[0]
            + foot_only_when_finished
            + "{% if add_gen"
            + SYSTEM_LAST.partition("{% if add_gen")[2],
        )
        for said in (("Hi", "yes"), ("Hi", "yes", "Well?", "no")):
            found = encoded(tokenizer, chat(*said))
            learned = [text for example in found.examples for text in turns(tokenizer, example)]
            assert learned == [f"{text}<|end|>" for text in said[1::2]], foot


def test_a_template_that_wants_a_system_message(smollm2: Any) -> None:
    refuses = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message is wanted') }}{% endif %}"
    tokenizer = with_template(smollm2, refuses + CHATML)
    assert end_of_turn(tokenizer) == "<|im_end|>"
    (example,) = encoded(tokenizer, chat("a", "b", system="S")).examples
    assert turns(tokenizer, example) == ["b<|im_end|>"]
    with pytest.raises(Usage, match="line 1: a system message is wanted"):
        encoded(tokenizer, chat("a", "b"))


def test_a_base_without_template_gets_chatml_whose_end_is_ordinary_text() -> None:
    tokenizer = byte_level(eos_token="<|endoftext|>")
    assert ensure_chat_template(tokenizer) is True
    assert tokenizer.chat_template == CHATML
    assert ensure_chat_template(tokenizer) is False
    assert end_of_turn(tokenizer) == "<|im_end|>"
    (example,) = encoded(tokenizer, chat("Hi", "one", "Hi", "two", system="S")).examples
    assert turns(tokenizer, example) == ["one<|im_end|>", "two<|im_end|>"]
    assert text_of(tokenizer, example).endswith("<|im_start|>assistant\ntwo<|im_end|>")  # and no EOS


def test_chatml_on_a_vocabulary_that_joins_its_end_with_the_newline() -> None:
    """GPT-4's word splitting, which Llama 3 and Qwen use, makes one token of "|>⏎"."""
    tokenizer = byte_level("|>Ċ", "Ċx", pattern=r"[A-Za-z_]+|[^\sA-Za-z]+[\r\n]*|\s*[\r\n]+|\s+", eos_token="</s>")
    ensure_chat_template(tokenizer)
    (example,) = encoded(tokenizer, chat("Hi", "one", "Hi", "two")).examples
    assert turns(tokenizer, example) == ["one<|im_end|>\n", "two<|im_end|>\n"]


def test_chatml_begins_with_bos_where_the_tokenizer_does() -> None:
    tokenizer = sentencepiece_like()
    assert ensure_chat_template(tokenizer)
    (example,) = encoded(tokenizer, chat("Hi", "yes")).examples
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_conversations_need_a_template() -> None:
    with pytest.raises(Usage, match="no chat template"):
        encoded(byte_level(), chat("a", "b"))
