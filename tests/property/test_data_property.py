"""What must hold for any conversation, any rows and any documents."""

from __future__ import annotations

from typing import Any

from chat_tokenizers import record_set
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import IGNORED, EncodeOptions, Example
from stackctl.engine.data.rows import collate, pack
from stackctl.engine.records.types import ChatRecord, CompletionRecord, TextRecord

EXPENSIVE = settings(max_examples=150, deadline=None)
PIECES = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "\n", "\n\n", " ", "  ", "😀", "👩‍👩‍👧", "你好", "é"]
# SmolLM2's vocabulary has no token for the bytes of these (and of the unassigned planes 4 to 11): it drops them.
UNSPEAKABLE = "\x04\x06\x13\x14\x16\x1d"
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=UNSPEAKABLE, max_codepoint=0x3FFFF)
CONTENT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(CHARACTERS))).map("".join)
SPOKEN = CONTENT.filter(str.strip)
CONVERSATION = st.lists(st.tuples(CONTENT, SPOKEN), min_size=1, max_size=4)


def runs(example: Example) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            found.append([])
        else:
            found[-1].append(token)
    return [run for run in found if run]


@EXPENSIVE
@given(CONVERSATION)
def test_each_turn_supervises_its_content_and_its_end(smollm2_tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    messages = []
    for user, assistant in pairs:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    found = encode(record_set(ChatRecord(1, messages)), smollm2_tokenizer, EncodeOptions(100_000))
    (example,) = found.examples
    decoded = [smollm2_tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs(example)]
    assert decoded == [assistant + "<|im_end|>" for _, assistant in pairs]
    rendered = smollm2_tokenizer.apply_chat_template(messages, tokenize=False)
    assert smollm2_tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False) + "\n" == rendered
    assert found.supervised_tokens == len(collate([example])["labels"])


@EXPENSIVE
@given(SPOKEN, SPOKEN)
def test_a_completion_follows_its_prompt_as_inference_tokenises_it(
    smollm2_tokenizer: Any, prompt: str, completion: str
) -> None:
    (example,) = encode(
        record_set(CompletionRecord(1, prompt, completion)), smollm2_tokenizer, EncodeOptions(100_000)
    ).examples
    ids = smollm2_tokenizer(prompt)["input_ids"]
    assert example.input_ids[: len(ids)] == ids
    expected = completion if completion.endswith("<|im_end|>") else completion + "<|im_end|>"
    assert [smollm2_tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs(example)] == [expected]


@EXPENSIVE
@given(SPOKEN, st.integers(2, 40))
def test_a_split_text_is_learned_once_and_a_cut_one_is_its_beginning(
    smollm2_tokenizer: Any, text: str, length: int
) -> None:
    whole = encode(record_set(TextRecord(1, text + "ab")), smollm2_tokenizer, EncodeOptions(100_000)).examples[0]
    split = encode(record_set(TextRecord(1, text + "ab")), smollm2_tokenizer, EncodeOptions(length, split_long=True))
    assert [label for piece in split.examples for label in piece.labels if label != IGNORED] == whole.input_ids[1:]
    cut = encode(record_set(TextRecord(1, text + "ab")), smollm2_tokenizer, EncodeOptions(length))
    assert cut.examples == [Example(whole.input_ids[:length], whole.labels[:length])]
    assert cut.truncated == (len(whole.input_ids) > length)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    ids = draw(st.lists(st.integers(0, 49_151), min_size=1, max_size=20))
    learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Example(
        ids, [token if yes and i else IGNORED for i, (token, yes) in enumerate(zip(ids, learned, strict=True))]
    )


@given(st.lists(examples(), max_size=8))
def test_collate_can_be_undone(rows: list[Example]) -> None:
    batch = {key: tensor.tolist() for key, tensor in collate(rows).items()}
    found: list[Example] = []
    labels = dict(zip([position + 1 for position in batch["keep"]], batch["labels"], strict=True))
    for index, (token, position) in enumerate(zip(batch["input_ids"][0], batch["position_ids"][0], strict=True)):
        if position == 0:
            found.append(Example([], []))
        assert position == len(found[-1].input_ids)
        found[-1].input_ids.append(token)
        found[-1].labels.append(labels.pop(index, IGNORED))
    assert not labels
    assert found == rows


@given(st.lists(examples(), max_size=40), st.integers(20, 60))
def test_pack_loses_nothing_and_fills_rows(documents: list[Example], length: int) -> None:
    rows = pack(documents, length)
    place = {id(document): index for index, document in enumerate(documents)}
    assert sorted(place[id(document)] for row in rows for document in row) == list(range(len(documents)))
    sizes = [sum(len(document.input_ids) for document in row) for row in rows]
    assert all(0 < size <= length for size in sizes)
    for row in rows:
        assert [place[id(document)] for document in row] == sorted(place[id(document)] for document in row)
    # No two rows could have been one: what fits is never given a row of its own.
    assert all(a + b > length for i, a in enumerate(sizes) for b in sizes[i + 1 :])
    assert list(rows) == list(pack(documents, length))
