"""Conversations of every shape, as records of JSON Lines and as transformers documents the same thing."""

from __future__ import annotations

import json
from typing import Any

from template_oracle import Case, Wanted

THOUGHT, ANSWER = "Two and two make four.", "It is 4."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which"}}},
    },
}


def user(text: str = "What is 2+2?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str = ANSWER, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(city: str = "Oslo") -> list[dict[str, Any]]:
    return [{"id": "abcde1234", "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}]


def result() -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": "abcde1234", "content": "12 degrees"}


def _case(
    messages: list[Any], *wanted: Wanted, spoken: list[Any] | None = None, tools: Any = None, **record: Any
) -> Case:
    """``spoken`` is how the record writes the messages where that is not how transformers does."""
    return Case({"messages": spoken or messages, **record}, messages, list(wanted), tools)


ONE = Wanted(1, answer=ANSWER)
THINKS = says(reasoning_content=THOUGHT)
THOUGHTFUL = Wanted(1, THOUGHT, ANSWER)
ASK = user("How is the weather?")
CALLED = Wanted(1, calls=(("get_weather", ("Oslo",)),))
REPORT = Wanted(3, answer="Cold today.")
WITH_CALL = [ASK, says("", tool_calls=call()), result(), says("Cold today.")]

SHAPES: dict[str, Case] = {
    "one turn": _case([user(), says()], ONE),
    "two turns": _case([user(), says(), user("And 3+3?"), says("That is 6.")], ONE, Wanted(3, answer="That is 6.")),
    "system": _case([{"role": "system", "content": "Be very brief."}, user(), says()], Wanted(2, answer=ANSWER)),
    "<think> in the content": _case(
        [user(), THINKS], THOUGHTFUL, spoken=[user(), says(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")]
    ),
    "<think> without white space": _case(
        [user(), THINKS], THOUGHTFUL, spoken=[user(), says(f"<think>{THOUGHT}</think>{ANSWER}")]
    ),
    "</think> alone": _case(
        [user(), THINKS], THOUGHTFUL, spoken=[user(), says(f"{THOUGHT}\n</think>\n\n{ANSWER}")]
    ),
    "reasoning_content": _case([user(), THINKS], THOUGHTFUL),
    "reasoning": _case([user(), THINKS], THOUGHTFUL, spoken=[user(), says(reasoning=THOUGHT)]),
    "two thoughts": _case(
        [user(), THINKS, user("And 3+3?"), says("That is 6.", reasoning_content="Three and three.")],
        THOUGHTFUL, Wanted(3, "Three and three.", "That is 6."),
        spoken=[
            user(), says(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"),
            user("And 3+3?"), says("<think>\nThree and three.\n</think>\n\nThat is 6."),
        ],
    ),
    "a thought, then none": _case(
        [user(), THINKS, user("And 3+3?"), says("That is 6.")], THOUGHTFUL, Wanted(3, answer="That is 6.")
    ),
    "tools": Case(
        {"messages": [ASK, says("Cold today.")], "tools": [TOOL]},
        [ASK, says("Cold today.")], [Wanted(1, answer="Cold today.")], [TOOL],
    ),
    "tools as JSON text": Case(
        {"messages": [ASK, says("Cold today.")], "tools": json.dumps([TOOL])},
        [ASK, says("Cold today.")], [Wanted(1, answer="Cold today.")], [TOOL],
    ),
    "tool_calls, content null": Case(
        {
            "messages": [ASK, {**says(), "content": None, "tool_calls": call()}, result(), says("Cold today.")],
            "tools": [TOOL],
        },
        WITH_CALL, [CALLED, REPORT], [TOOL],
    ),
    "tool_calls, content empty": Case({"messages": WITH_CALL, "tools": [TOOL]}, WITH_CALL, [CALLED, REPORT], [TOOL]),
    "tool_calls without tools": Case({"messages": WITH_CALL}, WITH_CALL, [CALLED, REPORT]),
    "tool_calls and content": Case(
        {"messages": [ASK, says("Let me see.", tool_calls=call())], "tools": [TOOL]},
        [ASK, says("Let me see.", tool_calls=call())],
        [Wanted(1, answer="Let me see.", calls=CALLED.calls)], [TOOL],
    ),
    "tool_calls and a thought": Case(
        {"messages": [ASK, says("", tool_calls=call(), reasoning_content=THOUGHT)], "tools": [TOOL]},
        [ASK, says("", tool_calls=call(), reasoning_content=THOUGHT)],
        [Wanted(1, THOUGHT, calls=CALLED.calls)], [TOOL],
    ),
    "arguments as JSON text": Case(
        {
            "messages": [
                ASK,
                says("", tool_calls=[{"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]),
            ],
            "tools": [TOOL],
        },
        WITH_CALL[:2], [CALLED], [TOOL],
    ),
    "function_call and observation": Case(
        {
            "conversations": [
                {"from": "human", "value": "How is the weather?"},
                {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": {"city": "Oslo"}})},
                {"from": "observation", "value": "12 degrees"},
                {"from": "gpt", "value": "Cold today."},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        [
            ASK,
            says("", tool_calls=[{key: value for key, value in call()[0].items() if key != "id"}]),
            {"role": "tool", "content": "12 degrees"},
            says("Cold today."),
        ],
        [CALLED, REPORT], [TOOL],
    ),
    "parts": _case(
        [user(), says()], ONE,
        spoken=[
            {"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
    ),
    "developer": _case([{"role": "developer", "content": "Be very brief."}, user(), says()], Wanted(2, answer=ANSWER)),
    "two answers in a row": _case([user(), says(), says("Or so.")], ONE, Wanted(2, answer="Or so.")),
    "a turn that is not learned": _case(
        [user(), says("No idea."), user("And 3+3?"), says("That is 6.")], Wanted(3, answer="That is 6."),
        spoken=[user(), says("No idea.", weight=0), user("And 3+3?"), says("That is 6.")],
    ),
    "an empty answer": _case([user(), says("")], Wanted(1, answer="")),
}  # fmt: skip
