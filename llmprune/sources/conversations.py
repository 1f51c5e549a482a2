"""Rows of data sets as text: their `text`, or a conversation as the model is used to reading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError
from llmprune.runtime.foreign import reading
from llmprune.sources.bos import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, MESSAGES = "text", "messages"


def row_text(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The field `text` of a row, or its field `messages` by the chat template; '' where that is null.

    Args:
        row: name of a field -> value.
        name: of the file, for messages.
        tokenizer: whose chat template is used; without one the messages are joined by line ends.

    Raises:
        InputError: the row has neither field, or something else in it.
    """
    field = next((field for field in (TEXT, MESSAGES) if field in row), None)
    if field is None:
        raise InputError(
            f"{name} has no field 'text' or 'messages', only {', '.join(map(str, row))}",
            "rename the field that holds the text to 'text', or name it in a recipe of `python -m calib`",
        )
    value = row[field]
    if value is None:
        return ""
    if field == MESSAGES:
        return conversation(value, name, tokenizer)
    if not isinstance(value, str):
        raise InputError(f"{name} has {value!r:.40} as 'text'", "the field 'text' holds text")
    return value


def conversation(messages: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation by the chat template, or joined by line ends; without BOS, which belongs to windows.

    Args:
        messages: list of `{"role": ..., "content": ...}`.
        name: of the file, for messages.
        tokenizer: with or without a chat template.

    Raises:
        InputError: it is no conversation, or none that the template can render.
    """
    good = isinstance(messages, list) and messages and all(map(_is_message, messages))
    if not good:
        raise InputError(
            f"{name} has {messages!r:.40} as a conversation", 'write it as [{"role": "user", "content": "..."}, ...]'
        )
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(message["content"] for message in messages)
    with reading(f"the model's chat template cannot render a conversation of {name}", "leave that conversation out"):
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text.removeprefix("".join(tokenizer.convert_ids_to_tokens(list(added_tokens(tokenizer)))))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
