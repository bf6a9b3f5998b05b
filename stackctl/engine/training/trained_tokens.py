"""The single tokens whose rows a job trains: by number, with what stands in the way."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stackctl.core import Say
from stackctl.core.errors import Incompatible, StackctlError, Usage, did_you_mean, raise_all
from stackctl.engine.base.module_shapes import computes
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.trained_tokens import AUTO, NONE, parse_tokens, token_modules


def tokens_of(prepared: PreparedJob, tokenizer: Any, say: Say = lambda _: None) -> dict[int, str]:
    """The tokens that a job trains, by their numbers; ``say`` is told what ``auto`` found.

    Raises:
        Usage: the tokenizer has no such token.
        Incompatible: the embeddings have no row for one, or the frozen stack has trained it.
    """
    asked, base = parse_tokens(prepared.job.train_tokens), prepared.base
    frozen, begun = frozen_tokens(prepared), _begun(prepared, tokenizer)
    if twice := [f"{begun[number]}, which {frozen[number]} has trained" for number in begun if number in frozen]:
        raise Incompatible(
            f"--from {prepared.beginning.label if prepared.beginning else ''} trains {'; '.join(twice)}: only one "
            "member of a stack may",
            hint="train it on a stack without that",
        )
    if asked == NONE:
        return begun
    if asked == AUTO:
        numbers = tokenizer.convert_tokens_to_ids(base.untrained_tokens)
        found = dict(zip(numbers, base.untrained_tokens, strict=True))
        if known := [token for number, token in found.items() if number in frozen]:
            say(f"note: the frozen stack has trained {', '.join(known)} already")
        left = {number: token for number, token in found.items() if number not in frozen}
        if not found:
            say(f"note: --train-tokens auto finds none that {base.name} never learned")
        return begun | left
    problems, chosen = list[StackctlError](), begun
    for token in asked:
        number = _number(token, tokenizer)
        if number is None:
            hint = did_you_mean(token, list(tokenizer.get_added_vocab()), "name single tokens as the tokenizer does")
            problems.append(Usage(f"--train-tokens: '{token[:80]}' is not a single token of '{base.name}'", hint=hint))
        elif number >= base.vocabulary_size:
            what = f"--train-tokens: the embeddings of '{base.name}' have no row for {token}"
            problems.append(Incompatible(what, hint="resize them first (transformers: resize_token_embeddings)"))
        elif number in frozen:
            what = f"--train-tokens: {frozen[number]} has trained {token}, and only one member of a stack may"
            problems.append(Incompatible(what, hint="leave it out: it is active as it was trained"))
        else:
            chosen[number] = token
    raise_all(problems)
    return chosen


def frozen_tokens(prepared: PreparedJob) -> dict[int, str]:
    """The tokens that the frozen stack has trained, with the member that did."""
    plan = prepared.plan
    return {token: plan.members[rows.member].label for rows in plan.token_rows for token in rows.tokens}


def _begun(prepared: PreparedJob, tokenizer: Any) -> dict[int, str]:
    """The tokens that the adapter which a job begins at has trained."""
    rows = prepared.beginning.plan.token_rows if prepared.beginning else ()
    numbers = sorted({token for own in rows for token in own.tokens})
    return dict(zip(numbers, tokenizer.convert_ids_to_tokens(numbers), strict=True))


def _number(token: str, tokenizer: Any) -> int | None:
    """A token's number, by its name in the vocabulary or by the text that it stands for."""
    vocabulary = tokenizer.get_vocab()
    for name in (token, token.strip()):
        if name in vocabulary:
            return int(vocabulary[name])
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def token_settings(prepared: PreparedJob, tokens: Collection[int], model: PreTrainedModel) -> dict[str, Any]:
    """What LoraConfig takes to train just these rows. ``model`` has no weights.

    Raises:
        Incompatible: PEFT would compute something else with them than the base does.
    """
    if not tokens:
        return {}
    base, modules = prepared.base, token_modules(prepared.base)
    for name in filter(None, dict.fromkeys((*modules, base.output_embedding))):
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding | nn.Linear):
            why = f"is a {type(module).__name__}, of which PEFT trains no single rows"
        elif isinstance(module, nn.Linear) and module.bias is not None:
            why = "has a bias, which PEFT leaves out where it trains single rows"
        elif computes(module):
            why = "does more than look up a row, behind which PEFT puts what it trains"
        else:
            continue
        raise Incompatible(f"--train-tokens: {name} of '{base.name}' {why}", hint="leave out --train-tokens")
    return {"trainable_token_indices": {name: sorted(tokens) for name in modules}}
