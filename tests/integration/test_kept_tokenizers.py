"""What is kept of a base in the cache and read without transformers gives transformers' own tokens and prompts."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from chat_tokenizers import (
    GEMMA,
    LLAMA2,
    MISTRAL,
    PHI3,
    PLAIN,
    QWEN3,
    REASONING,
    byte_level,
    sentencepiece_like,
    with_template,
)
from conversation_shapes import SHAPES
from template_oracle import NAMES, Oracle, tokenizer_of
from tiny import CHATML as TINY
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from stackctl.engine.base import tokenizer as base_reader
from stackctl.engine.base.tokenizer import BaseReader, KeptGenerationConfig, keep_reader, kept_reader, load_tokenizer
from stackctl.engine.data.chat_template import CHATML, TEMPLATE_ERRORS, ChatTemplate

OWN = {"qwen3": QWEN3, "gemma": GEMMA, "llama2": LLAMA2, "mistral": MISTRAL, "phi3": PHI3, "plain": PLAIN, "tiny": TINY}
OWN |= REASONING | {"chatml": CHATML, "chatml with bos": "{{ bos_token }}" + CHATML}
OPTIONS = ({}, {"enable_thinking": True}, {"enable_thinking": False}, {"thinking": True, "reasoning_effort": "low"})
CORNERS = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% if not m.content %}"
    "{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}{{ '<é>' | tojson }}"
    "{{ '<é>' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "raise": "{{ raise_exception('no such thing') }}",
    "namespace": "{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}",
    "hidden namespace": "{% set n = namespace(_a=1) %}{{ n }}",
    "hidden assignment": "{% set n = namespace() %}{% set n._a = 1 %}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['b']) }}",
    "class": "{{ dict.__class__ }}{{ ''.__class__.__mro__ }}",
    "append": "{% set _ = messages.append(1) %}",
    "update": "{% set _ = messages[0].update({'content': 'x'}) %}",
    "undefined": "{{ messages[0].nothing }}{{ nothing }}{{ nothing.at_all }}",
    "thoughts": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning }}|{{ m.reasoning_content }}\n{% endfor %}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ tools is none }}{{ documents is none }}",
    "white space": "  {% if true %}  \n  x\n  {%- endif %}\n\n{{ add_generation_prompt }}\n",
    "broken": "{% if %}",
    "today": "{{ strftime_now('%d %B %Y, %H') }}{% for m in messages %}{{ m.content }}{% endfor %}",
}


def kept(tokenizer, folder):
    """The same tokenizer, saved, kept and read again; and what transformers reads of the same folder."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    loaded = load_tokenizer(folder)
    assert keep_reader(folder, BaseReader(loaded, KeptGenerationConfig(3), 7))
    found = kept_reader(folder)
    assert (found.generation_config.eos_token_id, found.cached_numbers) == (3, 7)
    return found.tokenizer, loaded


def rendered(tokenizer, conversation, **options):
    """A text, or the kind of error. Each rendering gets messages of its own: pickled, they are copied soonest."""
    messages, tools = pickle.loads(conversation)
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except TEMPLATE_ERRORS as error:
        return next(kind for kind in TEMPLATE_ERRORS if isinstance(error, kind))


def opened(tokenizer):
    """What is found out about a template, or the kind of error."""
    try:
        template = ChatTemplate(tokenizer)
        keys = (template.opening, template.thought_key, template.arguments_as_text, template.wants_call_ids)
        return keys, template.tags, [template.role(r) for r in ("system", "developer", "tool", "ipython", "assistant")]
    except Exception as error:
        return type(error), str(error)


def check(light, heavy, conversations):
    texts = set()
    named = [options for options in OPTIONS if any(name in str(heavy.chat_template) for name in options)]
    different = {repr(conversation): conversation for conversation in conversations}  # some shapes differ as records
    for number, conversation in enumerate(map(pickle.dumps, different.values())):
        for prompt in (False, True):
            for options in OPTIONS if number == 0 else [{}, *named]:  # what a template does not name, it does not read
                options = {**options, "add_generation_prompt": prompt}
                text = rendered(heavy, conversation, **options)
                assert rendered(light, conversation, **options) == text
                texts.add(text)
    for text in texts:
        if isinstance(text, str):
            for special in (False, True):
                wanted = heavy(text, add_special_tokens=special)["input_ids"]
                assert light(text, add_special_tokens=special)["input_ids"] == wanted
                plain = {"skip_special_tokens": special, "clean_up_tokenization_spaces": False}
                assert light.decode(wanted, **plain) == heavy.decode(wanted, **plain)
    assert (light.bos_token, light.eos_token, light.eos_token_id) == (
        heavy.bos_token, heavy.eos_token, heavy.eos_token_id,
    )  # fmt: skip
    vocabulary = heavy.get_vocab()
    assert light.get_vocab() == vocabulary
    every = [*vocabulary.values()]
    assert light.convert_ids_to_tokens(every) == heavy.convert_ids_to_tokens(every) == [*vocabulary]
    assert (light.all_special_ids, light.convert_ids_to_tokens(99_999)) == (heavy.all_special_ids, None)
    assert opened(light) == opened(heavy)
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_every_template_of_trl_is_rendered_as_by_transformers(name, tmp_path):
    """Conversations of every shape, in every spelling that a template may want."""
    oracle = Oracle(name)
    light, heavy = kept(oracle.tokenizer, tmp_path / "base")
    conversations = [variant for case in SHAPES.values() for variant in oracle.variants(case)]
    texts = check(light, heavy, conversations)
    assert sum(isinstance(text, str) for text in texts) > 10


@pytest.mark.parametrize("name", [*OWN, *CORNERS])
def test_every_other_template_of_the_tests_and_the_corners_of_the_language(name, tmp_path, monkeypatch):
    monkeypatch.setenv("STACKCTL_TEMPLATE_DATE", "2024-02-29")
    made = with_template(byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>"), {**OWN, **CORNERS}[name])
    light, heavy = kept(made, tmp_path / "base")
    oracle = Oracle(NAMES[0])
    conversations = [variant for case in SHAPES.values() for variant in oracle.variants(case)]
    conversations += [([], None), ([{"role": "user", "content": None}], None), ([{"role": "user"}], [None])]
    if name == "today":
        both = [ChatTemplate(t).render([{"role": "user", "content": "x"}]) for t in (light, heavy)]
        assert both[0] == both[1] == "29 February 2024, 00x"
        assert light.apply_chat_template([{"role": "user", "content": "x"}]) == both[0]
        return
    check(light, heavy, conversations)


def unigram():
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁Hello", -3.0)]
    vocabulary += [(chr(number), -5.0 - number / 100) for number in range(33, 127)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [sentencepiece_like, unigram, lambda: tokenizer_of(NAMES[0])])
@pytest.mark.parametrize("bos", [None, True, False])
def test_the_tokens_are_those_of_transformers(make, bos, tmp_path):
    """Also where it puts tokens before a text, of its own accord or because it was told so."""
    tokenizer = make()
    tokenizer.chat_template = TINY
    tokenizer.save_pretrained(tmp_path)
    if bos is not None:
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": bos}))
        tokenizer = load_tokenizer(tmp_path)
    light, heavy = kept(tokenizer, tmp_path / "base")
    texts = [
        "",
        " ",
        "Hello  world",
        "\n\nHello\n",
        "it's 1,234.5 <s> </s> <pad>",
        "海は静か。🌊 é",
        "a" * 300,
        "\x00\t",
    ]
    for text in texts:
        for special in (False, True):
            assert (
                light(text, add_special_tokens=special)["input_ids"]
                == heavy(text, add_special_tokens=special)["input_ids"]
            )
    with pytest.raises(TypeError):
        light("half a character \ud800")


def test_a_copy_has_a_template_of_its_own(tmp_path):
    light, _ = kept(with_template(byte_level(eos_token="</s>"), TINY), tmp_path)
    other = copy.deepcopy(light)
    other.chat_template = "{{ eos_token }}"
    assert light.chat_template == TINY
    assert other.apply_chat_template([{"role": "user", "content": "x"}]) == "</s>"
    assert other("abc")["input_ids"] == light("abc")["input_ids"]


def test_a_tokenizer_with_ways_of_its_own_is_not_kept(tmp_path):
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):
            return super().apply_chat_template(*args, **kwargs) + "!"

    plain = with_template(byte_level(eos_token="</s>"), TINY)
    several = with_template(copy.deepcopy(plain), {"default": TINY, "tool_use": TINY})
    splits = copy.deepcopy(plain)
    splits.split_special_tokens = True
    own = with_template(Own(tokenizer_object=plain.backend_tokenizer, eos_token="</s>"), TINY)
    for tokenizer in (several, splits, own):
        assert not keep_reader(tmp_path, BaseReader(tokenizer, KeptGenerationConfig(None), 1))
    assert not list(tmp_path.iterdir()) and kept_reader(tmp_path) is None


@pytest.mark.parametrize("kind", [LlamaTokenizer, GPT2Tokenizer])
def test_a_class_that_builds_its_own_backend_is_kept_as_it_computes(kind, tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "Ġ": 7, "▁ab": 8}
    tokenizer = kind(vocab=vocabulary, merges=[("a", "b"), ("▁", "ab")], unk_token="<unk>", eos_token="</s>")
    light, heavy = kept(with_template(tokenizer, TINY), tmp_path)
    assert type(heavy) is kind
    for text in ("ab", " ab  ab", "b\na</s>"):
        assert light(text)["input_ids"] == heavy(text)["input_ids"]


def test_what_was_kept_is_of_these_files_and_this_transformers(tmp_path, monkeypatch):
    light, loaded = kept(with_template(byte_level(bos_token="<s>", eos_token="</s>"), TINY), tmp_path)
    assert light is not None
    for name, change in (
        ("tokenizer_config.json", lambda text: text.replace("}", ', "add_bos_token": true}', 1)),
        ("chat_template.jinja", lambda text: text + "!"),
        ("reader.tokenizer.json", lambda text: text[:-1]),
        ("reader.json", lambda text: text[:-1]),
    ):
        file = tmp_path / name
        before = file.read_text()
        file.write_text(change(before))
        assert kept_reader(tmp_path) is None, name
        file.write_text(before)
        assert kept_reader(tmp_path) is not None, name
    further = tmp_path / "additional_chat_templates"
    further.mkdir()
    assert kept_reader(tmp_path) is None
    further.rmdir()
    (tmp_path / "generation_config.json").write_text("{}")
    assert kept_reader(tmp_path) is None
    assert (
        keep_reader(tmp_path, BaseReader(loaded, KeptGenerationConfig([3, 4]), 7)) and kept_reader(tmp_path) is not None
    )
    monkeypatch.setattr(base_reader.importlib.metadata, "version", lambda _: "6.0.0")
    assert kept_reader(tmp_path) is None
