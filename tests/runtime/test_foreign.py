"""What others made is opened only as what it should be, and shown only as what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.errors import InputError, PruneError, printable
from llmprune.runtime.foreign import check_inside, open_regular, parse_json, read_json, reading, user_path


@given(st.text())
def test_what_is_shown_is_one_line_of_printable_letters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()
    assert PruneError(text, text).message == PruneError(text, text).hint == str(PruneError(text)) == shown


@pytest.mark.parametrize("text", ["naïve café", "模型", "a b", 'it\'s "quoted" \\n'])
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_no_two_texts_of_the_terminal_look_alike() -> None:
    assert printable("\x1b[31m\n\u202e\ud800") == "\\x1b[31m\\n\\u202e\\ud800"


def test_a_file_is_opened_but_no_pipe_no_device_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with open_regular(tmp_path / "file", most=5) as stream:
        assert stream.read() == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(OSError, match=f"it is {says}, not a regular file"):
            open_regular(path)
    with pytest.raises(OSError, match="5 bytes, more than 4"):
        open_regular(tmp_path / "file", most=4)


def test_only_objects_are_read_and_none_that_names_something_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, says in (("[]", "no object"), ("{", "Expecting"), ("[" * 10**5, "deeply"), ("\xff", "utf-8")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=says):
            read_json(path)
    path.write_text('{"a": {"b": 1, "b": 2}}')
    assert read_json(path) == {"a": {"b": 2}}
    with pytest.raises(ValueError, match="names 'b' twice"):
        read_json(path, unique=True)


@given(st.recursive(st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_is_what_the_standard_library_reads(value: object) -> None:
    assert parse_json(json.dumps(value), unique=True) == value


class PanicException(BaseException):
    """What PyO3 raises where Rust panics."""


@pytest.mark.parametrize(
    "error",
    [ValueError("x\ny"), KeyError("x"), RecursionError(), MemoryError(), OSError(2, "gone"), PanicException("bad")],
)
def test_whatever_is_raised_over_a_file_names_it(error: BaseException) -> None:
    with pytest.raises(InputError, match=r"^the file: .+") as refused, reading("the file", "do this"):
        raise error
    assert refused.value.hint == "do this"
    assert refused.value.__cause__ is error


def test_our_own_errors_and_interruptions_pass() -> None:
    for error in (PruneError("ours"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)), reading("the file", "do this"):
            raise error


def test_links_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("")
    (folder / "in").symlink_to("sub/../file")
    (folder / "out").symlink_to("../folder2")
    (folder / "absolute").symlink_to("/etc/passwd")
    (folder / "through").symlink_to("out")
    check_inside(folder / "in", folder)
    (tmp_path / "link").symlink_to("folder")
    check_inside(tmp_path / "link" / "in", tmp_path / "link")
    for name in ("out", "absolute", "through"):
        with pytest.raises(InputError, match="leaves its folder"):
            check_inside(folder / name, folder)


@pytest.mark.parametrize("path", ["a" * 300, "~nobody_at_all/x", "a\0b", "\udcff"])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="is no usable path"):
        user_path(path)


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
