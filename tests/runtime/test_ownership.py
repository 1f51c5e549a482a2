"""Only what carries our mark is deleted, by one process at a time, and no link is followed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llmprune.errors import InputError
from llmprune.runtime.ownership import LOCK, MARK, check_ours, own_folder, regular_files, scratch_folder

MINE = "years of work"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".out.partial"


def file(folder: Path) -> None:
    folder.write_text(MINE)


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text(MINE)


def like_ours(folder: Path) -> None:
    foreign(folder)
    (folder / LOCK).write_text(MINE)
    (folder / "state.json").write_text("{}")
    (folder / "model").mkdir()


def unmarked(folder: Path) -> None:
    foreign(folder)
    (folder / LOCK).touch()


def lock_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / LOCK).write_text(MINE)


def link(folder: Path) -> None:
    foreign(folder.with_name("mine"))
    folder.symlink_to("mine")


def link_to_ours(folder: Path) -> None:
    marked(folder.with_name("mine"))
    folder.symlink_to("mine")


def dangling(folder: Path) -> None:
    folder.symlink_to("nowhere")


def marked(folder: Path) -> None:
    foreign(folder)
    (folder / LOCK).write_bytes(MARK)


def marked_with_link(folder: Path) -> None:
    marked(folder)
    foreign(folder.with_name("mine"))
    (folder / "model").symlink_to("../mine")


def marked_with_deep_link(folder: Path) -> None:
    marked_with_link(folder)
    (folder / "model").unlink()
    (folder / "rank-1").mkdir()
    (folder / "rank-1" / "pruned-00001.bin").symlink_to("../../mine/thesis.txt")


def marked_by_link(folder: Path) -> None:
    foreign(folder)
    (folder / LOCK).symlink_to("../mark")
    folder.with_name("mark").write_bytes(MARK)


def marked_with_pipe(folder: Path) -> None:
    marked(folder)
    os.mkfifo(folder / "state.json")


def pipe_as_lock(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / LOCK)


REFUSED = [
    file, foreign, like_ours, unmarked, lock_alone, link, link_to_ours, dangling, marked_with_link,
    marked_with_deep_link, marked_by_link, marked_with_pipe, pipe_as_lock,
]  # fmt: skip


def names(folder: Path) -> dict[str, str]:
    regular, _ = regular_files(folder)
    found = {str(path.relative_to(folder)): path.read_text() for path in regular}
    return found | {str(path.relative_to(folder)): "" for path in folder.rglob("*") if path not in regular}


@pytest.mark.parametrize("make", REFUSED)
def test_what_is_not_ours_is_refused_and_left_as_it_is(make: Callable[[Path], None], folder: Path) -> None:
    make(folder)
    before = names(folder.parent)
    for use in (check_ours, lambda path: own_folder(path).__enter__(), lambda path: scratch_folder(path).__enter__()):
        with pytest.raises(InputError, match=str(folder)) as refusal:
            use(folder)
        assert "move yours away" in refusal.value.hint
    assert names(folder.parent) == before


@pytest.mark.parametrize("left", ["nothing", "folder", "lock", "all"])
def test_what_a_killed_process_left_is_taken_over_and_goes(folder: Path, left: str) -> None:
    if left != "nothing":
        folder.mkdir()
    if left == "lock":
        (folder / LOCK).touch()
    if left == "all":
        (folder / LOCK).write_bytes(MARK)
        (folder / "model").mkdir()
        (folder / "model" / "half").write_text("half")
    with scratch_folder(folder):
        assert {path.name for path in folder.iterdir()} == {LOCK}
        assert (folder / LOCK).read_bytes() == MARK
        (folder / "new").write_text("new")
    assert not list(folder.parent.iterdir())


def test_a_second_process_is_refused_or_waits(folder: Path) -> None:
    steps: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with scratch_folder(folder, waits.set):
            steps.append("second")

    thread = threading.Thread(target=second)
    with scratch_folder(folder):
        with pytest.raises(InputError, match="another llmprune is writing"), own_folder(folder):
            pass
        thread.start()
        assert waits.wait(10)
        steps.append("first")
    thread.join(10)
    assert steps == ["first", "second"]
    assert not list(folder.parent.iterdir())
