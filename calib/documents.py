"""From a source of a recipe to documents of token ids, one at a time: a data set never lies on the disk as a whole."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from calib.recipe import Part
from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.sources.conversations import conversation
from llmprune.sources.files import Row, is_structured, read_file, read_rows
from llmprune.sources.network import is_unreachable
from llmprune.sources.texts import files_of
from llmprune.sources.tokenize import text_ids

RETRIES = 5
BUFFER = 10_000


def documents(part: Part, tokenizer: Any, seed: int, progress: Progress) -> Iterator[list[int]]:
    """The token ids of every document, in an order that the seed sets.

    Args:
        part: the source.
        tokenizer: with a chat template, if the source has conversations.
        seed: of the order.
        progress: told about failures of the network.

    Raises:
        InputError: missing or damaged files, a row without the column, a network that stays away.
    """
    rows = _local_rows(part, seed) if part.path else _hub_rows(part, seed, progress)
    if part.join:
        rows = iter([{part.column: "\n\n".join(str(_cell(row, part.column, part)) for row in rows)}])
    for row in rows:
        text = _chat(row, part, tokenizer) if part.messages else str(_cell(row, part.column, part))
        yield text_ids([text], tokenizer)


def _cell(row: Row, column: str, part: Part) -> Any:
    if column not in row:
        raise InputError(f"{part.name} has no column {column!r}, only {', '.join(row)}", "set column or messages")
    return row[column]


def _chat(row: Row, part: Part, tokenizer: Any) -> str:
    """A conversation as the model is used to reading it."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{part.name} holds conversations, but the model has no chat template", "leave this source out"
        )
    return conversation(_cell(row, part.messages, part), part.name, tokenizer)


def _local_rows(part: Part, seed: int) -> Iterator[Row]:
    path = Path(part.path).expanduser()
    rows = [row for file in (files_of(path) if path.is_dir() else [path]) for row in _rows_of(file, part)]
    if not part.join:
        random.Random(seed).shuffle(rows)  # noqa: S311
    return iter(rows)


def _rows_of(file: Path, part: Part) -> list[Row]:
    if is_structured(file):
        return list(read_rows(file))
    text = read_file(file)
    return [{part.column: piece} for piece in (text.split(part.separator) if part.separator else [text])]


def _hub_rows(part: Part, seed: int, progress: Progress) -> Iterator[Row]:
    """Stream a data set, in a shuffled order unless its rows are to be joined."""
    import datasets

    def opened(skip: int) -> Iterable[Row]:
        stream: Any = datasets.load_dataset(
            part.repo, part.config or None, split=part.split, revision=part.revision or None, streaming=True
        )
        if not part.join:
            stream = stream.shuffle(seed=seed, buffer_size=BUFFER)
        rows: Iterable[Row] = stream.skip(skip) if skip else stream
        return rows

    return retried(opened, part.name, progress)


def retried(
    opened: Callable[[int], Iterable[Row]], name: str, progress: Progress, wait: Callable[[float], None] = time.sleep
) -> Iterator[Row]:
    """The items of a stream that is opened again where it broke off, at most `RETRIES` times without an item between.

    Args:
        opened: gives the stream without its first items, always in the same order.
        name: of the stream, for messages.
        progress: told about each failure.
        wait: sleeps for so many seconds.

    Raises:
        InputError: it keeps failing, or fails in a way that time does not heal.
    """
    done = failures = 0
    while True:
        try:
            for item in opened(done):
                done, failures = done + 1, 0
                yield item
            return
        except Exception as error:
            failures += 1
            says = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            if failures > RETRIES or not _passing(error, done):
                raise InputError(
                    f"{name} cannot be read from the Hugging Face Hub: {says}", "check the name and the network"
                ) from error
            progress.note(f"{name} broke off after {done} documents ({says}); trying again")
            wait(2.0**failures)


def _passing(error: Exception, done: int) -> bool:
    """Whether a failure after `done` documents may be over in a moment."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in {408, 429} or response.status_code >= 500
    # A data set that is not there is a FileNotFoundError; in the middle of a stream it is an outage.
    return is_unreachable(error) and (done > 0 or not isinstance(error, FileNotFoundError))
