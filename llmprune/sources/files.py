"""Text in files of others: plain text piece by piece, and the rows of .jsonl, .json, .csv, .tsv and .parquet files."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.runtime.foreign import JSON_BYTES, open_regular, parse_json, read_text, reading, reason

PIECE_BYTES = 2**19
Row = dict[str, Any]


def read_file(path: Path) -> str:
    """The text of a plain text file; see `file_pieces`."""
    return "".join(file_pieces(path))


def file_pieces(path: Path) -> Iterator[str]:
    """A UTF-8 text file, piece by piece, without byte order mark, all line ends as `\\n`.

    Raises:
        InputError: missing, blank, binary, not UTF-8, or no regular file.
    """
    plain = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(plain, translate=True)
    size, begun, blank = 0, False, True
    try:
        with open_regular(path) as stream:
            while raw := stream.read(PIECE_BYTES):
                text = decoder.decode(raw)
                text, begun = text if begun else text.removeprefix("\ufeff"), begun or bool(text)
                blank = blank and not text.strip()
                yield _checked(text, path)
                size += len(raw)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder had kept the first bytes of a character that the last piece cut.
        at = size - len(error.object) + len(raw) + error.start
        raise InputError(f"{path} is not UTF-8 text (byte {at})", "convert it to UTF-8 plain text") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}", "name a readable text file") from error
    if blank:
        raise InputError(f"{path} is empty", "name a text file with text in it")


def _checked(text: str, path: Path) -> str:
    if "\0" in text:
        raise InputError(f"{path} is a binary file", "name a plain text file")
    return text


def is_structured(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return path.suffix.lower() in _READERS


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a structured file, in order: name of a field -> value.

    Raises:
        InputError: missing, damaged, or not of the kind that its name says.
    """
    with reading(f"{path} cannot be read", "check the file, or save its texts as plain text"):
        yield from _READERS[path.suffix.lower()](path)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(
                    f"{path} is not JSON line by line: line {number}: {error}", "one JSON object a line"
                ) from error
            yield _row(row, path)


def _json(path: Path) -> Iterable[Row]:
    """An object, a list of objects, or JSON lines under another name."""
    first = next(line for line in _lines(path) if line.strip())
    try:
        if isinstance(parse_json(first), dict):
            return _json_lines(path)
    except ValueError:
        pass  # an object or a list over several lines
    found = parse_json(read_text(path).removeprefix("\ufeff"))
    return [_row(row, path) for row in (found if isinstance(found, list) else [found])]


def _row(value: Any, path: Path) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{path} has rows that are no JSON objects", 'write each as {"text": "..."}')
    return value


def _table(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def rows(path: Path) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), JSON_BYTES))
        yield from csv.DictReader((line + "\n" for line in _lines(path)), delimiter=delimiter)

    return rows


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with open_regular(path) as stream:
        for batch in ParquetFile(stream).iter_batches(256):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends."""
    rest = ""
    for piece in file_pieces(path):
        *lines, rest = (rest + piece).split("\n")
        if len(rest) > JSON_BYTES:
            raise ValueError(f"it has a line of more than {JSON_BYTES:,} characters")
        yield from lines
    yield rest


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".jsonlines": _json_lines, ".json": _json,
    ".csv": _table(","), ".tsv": _table("\t"), ".parquet": _parquet,
}  # fmt: skip
