"""What is written in a file becomes text, and what a file is written with does not."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import word_tokenizer
from pyarrow import parquet

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.sources import files
from llmprune.sources.files import file_pieces, read_file
from llmprune.sources.texts import Reader, text_pieces

TEXTS = ['She said "no",\nand left.', "C:\\dir\tü 日本 \u2028 end", "third"]
ROWS: list[dict[str, Any]] = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "hi w5"}, {"role": "assistant", "content": "w6"}]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(lines(ROWS), encoding="utf-8"),
    "a.ndjson": lambda path: path.write_text("\n" + lines(ROWS).rstrip("\n"), encoding="utf-8"),
    "a.JSONL": lambda path: path.write_text("\ufeff" + lines(ROWS).replace("\n", "\r\n"), encoding="utf-8", newline=""),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "one line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: path.write_text(lines(ROWS), encoding="utf-8"),
    "a.csv": lambda path: write_table(path, ","),
    "a.tsv": lambda path: write_table(path, "\t"),
    "a.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


def text_of(source: Path, tokenizer: Any = None) -> str:
    return "".join(text_pieces(str(source), "calibration", Reader(tokenizer, source, Progress()), 10, 0))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("piece", [3, 2**19])
def test_rows_are_their_texts_with_blank_lines_between(
    name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece)
    WRITERS[name](tmp_path / name)
    assert text_of(tmp_path / name) == "\n\n".join(TEXTS)
    assert text_of(tmp_path) == "\n\n".join(TEXTS)


def test_one_object_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n  "text": "w1"\n}')
    assert text_of(tmp_path / "a.json") == "w1"


def test_null_and_blank_rows_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": None}, {"text": "w1"}, {"text": " \n"}, {"text": "w2"}]))
    assert text_of(tmp_path / "a.jsonl") == "w1\n\nw2"


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'w1 ' * 200_000}\n")
    assert text_of(tmp_path / "a.csv") == "w1 " * 200_000


@pytest.mark.parametrize("bos", [None, "w9"])
def test_conversations_go_through_the_chat_template_and_bos_is_left_to_the_windows(
    bos: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"messages": TALK}, {"messages": TALK[:1]}]))
    tokenizer: Any = word_tokenizer(12, [bos] if bos else [])
    assert text_of(tmp_path / "a.jsonl", tokenizer) == "hi w5\nw6\n\nhi w5"
    tokenizer.chat_template = CHAT
    assert text_of(tmp_path / "a.jsonl", tokenizer) == "[user] hi w5\n[assistant] w6\n\n\n[user] hi w5\n"


BAD: dict[str, tuple[str, str, str]] = {
    "no field": ("a.jsonl", lines([{"body": "w1", "id": 3}]), "no field 'text' or 'messages', only body, id"),
    "no column": ("a.csv", "body,id\nw1,3\n", "no field 'text' or 'messages', only body, id"),
    "number": ("a.jsonl", lines([{"text": 3}]), "has 3 as 'text'"),
    "talk": ("a.jsonl", lines([{"messages": "hi"}]), "has 'hi' as a conversation"),
    "half a talk": ("a.jsonl", lines([{"messages": [{"role": "user"}]}]), "as a conversation"),
    "cut line": ("a.jsonl", '{"text": "w1"}\n{"text": ', "not JSON line by line: line 2"),
    "plain text": ("a.jsonl", "w1 w2", "not JSON line by line: line 1"),
    "lists": ("a.jsonl", "[1]\n", "rows that are no JSON objects"),
    "strings": ("a.json", '["w1"]', "rows that are no JSON objects"),
    "cut": ("a.json", '[{"text": "w1"', "cannot be read"),
    "nested": ("a.jsonl", '{"text": ' + "[" * 10**5, "nested too deeply"),
    "blank": ("a.jsonl", " \n\n", "is empty"),
    "header": ("a.csv", "text\n", "no text in its rows"),
    "nulls": ("a.jsonl", lines([{"text": None}]), "no text in its rows"),
    "parquet": ("a.parquet", "w1", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    file, content, says = BAD[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=says) as refusal:
        text_of(tmp_path / file)
    assert file in str(refusal.value)
    assert refusal.value.hint


def test_a_template_that_fails_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"messages": TALK}]))
    tokenizer: Any = word_tokenizer(12)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"cannot render a conversation of .*a\.jsonl: roles must alternate"):
        text_of(tmp_path / "a.jsonl", tokenizer)


def test_a_line_without_an_end_is_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_BYTES", 1000)
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "w1 " * 1000)
    with pytest.raises(InputError, match="a line of more than 1,000 characters"):
        text_of(tmp_path / "a.jsonl")


# Folders


def test_a_folder_is_read_for_text_and_json_lines_and_for_other_rows_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"description": "no text"}')
    (tmp_path / "b.txt").write_text("w2")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text(lines([{"text": "w3"}, {"text": "w4"}]))
    (tmp_path / "a.TXT").write_text("w1")
    assert text_of(tmp_path) == "w1\n\nw2\n\nw3\n\nw4"
    for file in ("a.TXT", "b.txt", "sub/a.jsonl"):
        (tmp_path / file).unlink()
    (tmp_path / "c.json").write_text('{"text": "w5"}')
    assert text_of(tmp_path) == "w5"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_a_pipe_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="a pipe, not a regular file"):
            text_of(source)


# Plain text


@pytest.mark.parametrize("piece", range(1, 9))
def test_line_ends_and_byte_order_mark_are_no_text(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffä\r\nb\r\r\n\nc 日\ufeff\r".encode())
    assert read_file(path) == "ä\nb\n\n\nc 日\ufeff\n"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("raw", "at"), [(b"w1 \xff", 3), ("日本".encode() + b"\xe6\x97", 6), (b"\xef\xbb\xbfab\xc3(", 5), (b"\xff\xfea", 0)]
)
def test_what_is_not_utf8_is_named_by_its_place(
    raw: bytes, at: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece)
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(UnicodeDecodeError) as plain:
        raw.decode("utf-8")
    assert plain.value.start == at
    with pytest.raises(InputError, match=rf"not UTF-8 text \(byte {at}\)"):
        read_file(tmp_path / "a.txt")


def test_a_file_is_read_no_further_than_it_is_asked_for(tmp_path: Path) -> None:
    """Of 5 GiB the first piece, and then up to the first byte that no text has."""
    path = tmp_path / "a.txt"
    with path.open("wb") as stream:
        stream.write(b"w1 " * files.PIECE_BYTES)
        stream.truncate(5 * 2**30)
    pieces = file_pieces(path)
    assert next(pieces) == ("w1 " * files.PIECE_BYTES)[: files.PIECE_BYTES]
    with pytest.raises(InputError, match="is a binary file"):
        list(pieces)
