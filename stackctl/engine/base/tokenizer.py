"""A base's tokenizer and what else prompts and answers need of it: by transformers, or kept from there and read again.

transformers takes seconds to load. So what it made of the files of a base in the cache is kept beside them: the
tokenizer's backend (of the library ``tokenizers``), its special tokens, the tokens that end an answer. It is kept only
where nothing in the tokenizer's class computes otherwise, and only for the same files under the same transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.base.configuration import cached_numbers
from stackctl.engine.data.chat_template import TEMPLATE_ERRORS, at_date, run_date
from stackctl.engine.data.template_rendering import render_template
from stackctl.engine.libraries import off_stdout
from stackctl.engine.records.types import Message
from stackctl.lora.checkpoint import TEMPLATE_FILE
from stackctl.registry.base_models import TOKENIZER
from stackctl.storage import atomic
from stackctl.storage.files import read_json_if_any
from stackctl.storage.hashes import DigestCache, sha256_file
from stackctl.storage.paths import cache_root

_FACTS, _BACKEND = "reader.json", "reader.tokenizer.json"
_FURTHER = "additional_chat_templates"
"""A folder of further templates, by name, among which transformers chooses."""
_LAYOUT = 2
_READ = (*TOKENIZER, TEMPLATE_FILE, "config.json", "generation_config.json")
_TEXTS = ("", "Hello, world!", "  two  spaces\n\n\tand a tab ", "Grüße — 海は静か。 🌊", "it's 12,345.67 <b>x</b>")
_OWN = (
    "__call__", "_encode_plus", "apply_chat_template", "get_chat_template", "special_tokens_map", "get_vocab",
    "convert_ids_to_tokens", "decode", "_decode", "all_special_ids",
)  # fmt: skip
"""What of a tokenizer's class is done without it; one that has its own is not kept."""


@dataclass(frozen=True)
class KeptGenerationConfig:
    """Of a base's generation configuration, the tokens that end an answer."""

    eos_token_id: int | list[int] | None


@dataclass(frozen=True)
class BaseReader:
    """What prompts and answers need of a base; ``cached_numbers`` as of :mod:`stackctl.engine.base.configuration`."""

    tokenizer: Any
    generation_config: Any
    cached_numbers: int


class KeptTokenizer:
    """A tokenizer as far as prompts need it, with the names and the results of transformers'."""

    def __init__(self, backend: Path, facts: dict[str, Any]) -> None:
        self._file = backend
        self._special: dict[str, str] = facts["special_tokens"]
        self.eos_token_id: int | None = facts["eos_token_id"]
        self.all_special_ids: list[int] = facts["special_ids"]
        self.chat_template: str | None = facts["chat_template"]

    @functools.cached_property
    def _backend(self) -> Any:
        """Read when the first text is there: a large one takes a moment."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._file))

    @property
    def bos_token(self) -> str | None:
        return self._special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self._special.get("eos_token")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **arguments: Any,
    ) -> str:
        """The text of a conversation, which is all that ``tokenize`` may ask for.

        Raises:
            TEMPLATE_ERRORS: what the template raises.
        """
        assert not tokenize and self.chat_template
        variables = {**self._special, **arguments}
        return render_template(self.chat_template, messages, tools, prompt=add_generation_prompt, variables=variables)

    def get_vocab(self) -> dict[str, int]:
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(number) for number in ids]

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Tokens as text, every space as it was written: none is cleaned up."""
        assert not clean_up_tokenization_spaces
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def __deepcopy__(self, memo: Any) -> KeptTokenizer:
        """Another one with a chat template of its own; the backend, which nobody changes, is the same."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base's folder by transformers, without the network and without code of its own.

    Raises:
        Incompatible: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        with off_stdout():  # tokenizers tells there which keys of its file it does not know
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(found.model_max_length, int | float):
            raise ValueError(f"model_max_length is {found.model_max_length!r}")
        return found
    except Exception as error:  # tokenizers raises no other kind
        raise Incompatible(f"{folder} has no usable tokenizer ({first_line(error)[:200]})") from error


def load_reader(folder: Path) -> BaseReader:
    """The same, and what else is read of a base, by transformers.

    Raises:
        Incompatible: transformers cannot read the tokenizer, or the generation configuration.
    """
    from transformers import AutoConfig, GenerationConfig

    from stackctl.engine.base.configuration import read_generation_config

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    generation = read_generation_config(folder) or GenerationConfig.from_model_config(config)
    return BaseReader(load_tokenizer(folder), generation, cached_numbers(config.get_text_config(decoder=True)))


def kept_reader(folder: Path) -> BaseReader | None:
    """What was kept of a base in the cache; None where nothing was, or it is of other files or another transformers."""
    facts = read_json_if_any(folder / _FACTS)
    backend = folder / _BACKEND
    if facts.get("transformers") != _made_by() or (folder / _FURTHER).exists():
        return None
    digests = DigestCache(cache_root())
    current = {name: digests.sha256(folder / name) for name in _files(folder)}
    same = facts.get("files") == current and backend.is_file() and digests.sha256(backend) == facts.get("backend")
    digests.save()
    if not same:
        return None
    return BaseReader(KeptTokenizer(backend, facts), KeptGenerationConfig(facts["ends"]), facts["cached_numbers"])


def keep_reader(folder: Path, reader: BaseReader) -> bool:
    """Keep what transformers read of a base in the cache; False where it cannot be had without transformers."""
    tokenizer = reader.tokenizer
    if not _is_plain(tokenizer):
        return False
    facts = {
        "special_tokens": tokenizer.special_tokens_map,
        "special_ids": tokenizer.all_special_ids,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "ends": reader.generation_config.eos_token_id,
        "cached_numbers": reader.cached_numbers,
        "files": {name: sha256_file(folder / name) for name in _files(folder)},
        "transformers": _made_by(),
    }
    with contextlib.suppress(OSError):  # a cache that nobody may write is read as it is
        backend = folder / _BACKEND
        atomic.write_atomic(backend, tokenizer.backend_tokenizer.to_str())
        if _differs(tokenizer, KeptTokenizer(backend, facts)):
            backend.unlink()
            return False
        atomic.write_atomic(folder / _FACTS, json.dumps({**facts, "backend": sha256_file(backend)}))
        return True
    return False


def _made_by() -> list[Any]:
    return [_LAYOUT, importlib.metadata.version("transformers")]


def _files(folder: Path) -> list[str]:
    """The files that transformers read."""
    return [name for name in _READ if (folder / name).is_file()]


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer is its backend and nothing else."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and all(getattr(kind, name) is getattr(TokenizersBackend, name) for name in _OWN)
        and not tokenizer.split_special_tokens
        and isinstance(tokenizer.chat_template, str | None)  # not one of several
    )


def _differs(one: Any, other: Any) -> bool:
    """Whether two tokenizers make other tokens of some texts, or other texts of some conversations."""
    special = [str(token) for token in one.all_special_tokens]
    texts = [*_TEXTS, "".join(special), " a ".join(["", *special, ""])]
    for text in texts:
        for added in (False, True):
            if one(text, add_special_tokens=added)["input_ids"] != other(text, add_special_tokens=added)["input_ids"]:
                return True
    user: Message = {"role": "user", "content": _TEXTS[1]}
    talks: list[list[Message]] = [[user], [{"role": "system", "content": "Be brief."}, user]]
    talks.append([user, {"role": "assistant", "content": _TEXTS[2]}, user])
    return one.get_vocab() != other.get_vocab() or (
        one.chat_template is not None
        and any(_rendered(one, talk, p) != _rendered(other, talk, p) for talk in talks for p in (False, True))
    )


def _rendered(tokenizer: Any, messages: list[Message], prompt: bool) -> str | None:
    try:
        with at_date(run_date()):
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TEMPLATE_ERRORS:
        return None
    return text
