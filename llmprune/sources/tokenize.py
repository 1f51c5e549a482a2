"""A long text in pieces that can be tokenised one by one: together they give the ids of the text as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**19
"""Characters of a piece, about; the ids of a piece take a hundred bytes a character while it is tokenised."""
CONTEXT = 256
"""Characters on both sides of a cut that are tokenised to see that nothing reaches across it."""
TRIES = 32
_PLACES = (re.compile(r"(?<=\S)\s(?=\S)"), re.compile(r"(?<=[^\w\s])(?=\w)"))
"""Where a text may be cut, best first: at single white space; behind punctuation."""


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text alone, without what the tokenizer puts around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def text_ids(text: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text in parts, the same as of the text as a whole."""
    return [token for piece in separable(text, tokenizer) for token in token_ids(piece, tokenizer)]


def separable(text: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Cut a text where tokenising both sides apart gives the same ids as tokenising across.

    A text of up to `PIECE` characters stays whole, as does one that cannot be cut so.

    Args:
        text: in parts of any size.
        tokenizer: of the model.
    """
    parts: list[str] = []
    size, wanted = 0, PIECE
    for part in text:
        parts.append(part)
        size += len(part)
        while size > wanted + CONTEXT:
            whole = "".join(parts)
            cut = _cut(whole, wanted, tokenizer)
            if cut is None:
                parts, wanted = [whole], wanted + PIECE
                continue
            yield whole[: cut[0]]
            parts, size, wanted = [whole[cut[1] :]], len(whole) - cut[1], PIECE
    if rest := "".join(parts):
        yield rest


def _cut(text: str, end: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Where the left side of a cut ends, at most at `end`, and where the right side begins; None if there is none."""
    start = max(end - PIECE // 2, 1)
    for place in _PLACES:
        for found in [match.start() for match in place.finditer(text, start, end)][: -TRIES - 1 : -1]:
            left, right = text[max(found - CONTEXT, 0) : found], text[found : found + CONTEXT]
            across, before = token_ids(left + right, tokenizer), token_ids(left, tokenizer)
            # Some tokenizers put a space before every text, in place of the one that is dropped here.
            for dropped in (0, 1) if right[0] == " " else (0,):
                if across == before + token_ids(right[dropped:], tokenizer):
                    return found, found + dropped
    return None
