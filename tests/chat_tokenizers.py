"""Tokenizers and chat templates that behave like others', and records and their supervised tokens as text."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import IGNORED, Encoded, EncodeOptions, Example
from stackctl.engine.records.read import RecordStream
from stackctl.engine.records.sources import Source
from stackctl.engine.records.types import ChatRecord

QWEN3 = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = \
loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}\
{%- set content = m.content %}{%- set thought = '' %}{%- if '</think>' in content %}\
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}\
{%- if loop.index0 > ns.last and (loop.last or thought) %}\
{{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}\
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}\
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}\
{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

LLAMA2 = """{% for m in messages %}{% if m['role'] == 'user' %}\
{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}\
{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

MISTRAL = """{%- set system = '' %}{%- set turns = messages %}{%- if messages[0].role == 'system' %}\
{%- set system = messages[0].content + '\n\n' %}{%- set turns = messages[1:] %}{%- endif %}{{- bos_token }}\
{%- for m in turns %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{- raise_exception('roles must alternate') }}{%- endif %}{%- if m.role == 'user' %}\
{{- '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}\
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"""

PHI3 = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

PLAIN = """{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

_HEAD = "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% elif m.role == 'assistant' %}"
_TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}"
_AFTER = "{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>"

REASONING = {
    # the generation prompt ends the thought, or opens it when told to
    "DeepSeek-V3.1": f"{_HEAD}[A]</think>{_AFTER}{_TAIL}[A]"
    "{{ '<think>' if thinking else '</think>' }}{% endif %}",
    "EXAONE-4": f"{_HEAD}[A]\n<think>\n\n</think>\n\n{_AFTER}{_TAIL}[A]\n"
    "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}",
    # the generation prompt opens the thought, and history drops it
    "GLM-Z1": f"{_HEAD}[A]\n{_AFTER}{_TAIL}[A]\n<think>\n{{% endif %}}",
    # the generation prompt opens the thought, and history ends one that is empty
    "GLM-5": f"{_HEAD}[A]{{% if m.reasoning_content %}}<think>{{{{ m.reasoning_content }}}}{{% endif %}}</think>"
    f"{{{{ m.content }}}}<|im_end|>{_TAIL}[A]<think>{{% endif %}}",
    # an empty thought stands before every answer
    "Kimi-K2-Thinking": f"{_HEAD}[A]<think>{{{{ m.reasoning_content or '' }}}}</think>{{{{ m.content }}}}<|im_end|>"
    f"{_TAIL}[A]{{% endif %}}",
    # an empty thought stands before a content that has one of its own
    "no key": f"{_HEAD}[A]<think></think>{{{{ m.content }}}}<|im_end|>{_TAIL}[A]{{% endif %}}",
    # history drops the thought, and the generation prompt knows nothing of it
    "stripped": f"{_HEAD}[A]{_AFTER}{_TAIL}[A]{{% endif %}}",
}
"""Templates of published reasoning models, by what they do to a turn of the assistant."""

USER = {"role": "user", "content": "q"}


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(*words: str) -> Any:
    """A tokenizer that, as Llama 2's, puts a space before whatever it is given, and a BOS before a text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for character in [*map(chr, range(33, 127)), "\n", "▁"]:
        vocabulary.setdefault(character, len(vocabulary))
    merges = []
    for word in ("▁Hello", "▁yes", "▁Hi", *words):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(*merged: str, pattern: str | None = None, **special: str) -> Any:
    """A byte-level BPE of single bytes and of the given words; ``pattern`` splits words as GPT-4's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    merges = []
    for word in merged:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def chat(*contents: str, system: str | None = None, number: int = 1, context: int = 0) -> ChatRecord:
    """User and assistant in turn."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]
    return ChatRecord(number, [{"role": "system", "content": system}, *messages] if system else messages, context)


def record_set(*records: Any, unit: Any = "line") -> RecordStream:
    source = Source("x.jsonl", "sha256:0", unit, lambda seen: iter(()))
    return RecordStream(source, format="messages", count=len(records), kept=records)


def encoded(tokenizer: Any, *records: Any, max_length: int = 4096, **options: Any) -> Encoded:
    return encode(record_set(*records), tokenizer, EncodeOptions(max_length, **options))


def turns(tokenizer: Any, example: Example) -> list[str]:
    """The decoded text of each run of supervised tokens."""
    assert len(example.input_ids) == len(example.labels)
    assert example.labels[0] == IGNORED
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


def text_of(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False)
