"""How windows of text begin: with BOS, where the model's tokenizer begins a text with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a"


def window_beginning(tokenizer: PreTrainedTokenizerBase, bos: str) -> tuple[int, ...]:
    """The token ids that every window begins with, before its text.

    Args:
        tokenizer: of the model.
        bos: `auto`: what the tokenizer puts before a text; `yes`: the same, or the BOS token where that is nothing;
            `no`: nothing, as in the literature.

    Raises:
        InputError: `yes`, but the tokenizer has no BOS token.
    """
    if bos == "no":
        return ()
    added = added_tokens(tokenizer)
    if added or bos == "auto":
        return added
    if tokenizer.bos_token_id is None:
        raise InputError("--bos yes, but the model's tokenizer has no BOS token", "leave it out: --bos auto")
    return (int(tokenizer.bos_token_id),)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that the tokenizer puts before a text: BOS, nothing, and in a few models more than one."""
    whole: list[int] = tokenizer(PROBE)["input_ids"]
    plain: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)])
