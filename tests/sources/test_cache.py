"""An entry of the cache is made once, by one process, and is there whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.ownership import LOCK, MARK
from llmprune.sources.cache import make_once


class Told(Progress):
    """Knows when it is told something."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.heard = threading.Event()

    def note(self, text: str) -> None:
        self.said.append(text)
        self.heard.set()


def test_two_first_uses_at_once_make_one_entry(tmp_path: Path) -> None:
    entry, told, made = tmp_path / "cache" / "entry", Told(), []

    def make(path: Path) -> None:
        made.append(path)
        if len(made) == 1:
            second.start()
            assert told.heard.wait(10)
        path.write_text("whole")

    second = threading.Thread(target=lambda: make_once(entry, entry.exists, make, told))
    assert make_once(entry, entry.exists, make, Progress()) == entry
    second.join(10)
    assert told.said == [f"another llmprune is making {entry}: waiting for it"]
    assert len(made) == 1
    assert entry.read_text() == "whole"
    assert list(entry.parent.iterdir()) == [entry]


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_killed_process_left_goes(tmp_path: Path, finished: bool) -> None:
    entry, making = tmp_path / "entry", tmp_path / ".entry.making"
    making.mkdir()
    (making / LOCK).write_bytes(MARK)
    (making / "half").write_text("half")
    if finished:
        entry.write_text("whole")
    make_once(entry, entry.exists, lambda path: path.write_text("whole") and None, Progress())
    assert entry.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [entry]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "entry", (tmp_path / "entry").exists, fail, Progress())
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="cannot write to the cache folder"):
        make_once(tmp_path / "entry", lambda: False, Path.mkdir, Progress())
    assert (tmp_path / "entry" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
