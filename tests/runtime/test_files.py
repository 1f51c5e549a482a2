"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from llmprune.errors import InputError
from llmprune.runtime.files import appearing_folder, replacing, write_json


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": 1})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_temporary_file_is_no_name_that_a_user_gives_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").write_text("mine")
    (tmp_path / "mine").write_text("mine")
    with replacing(tmp_path / "x.json") as temporary:
        temporary.write_text("new")
    temporary.symlink_to(tmp_path / "mine")
    write_json(tmp_path / "x.json", 1)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.json": "1\n",
        "x.tmp": "mine",
        "mine": "mine",
    }


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "new" / "out"
    if exists:
        target.mkdir(parents=True)
    with appearing_folder(target) as hidden:
        assert hidden.is_dir()
        assert not any(hidden.iterdir())
        (hidden / "new").write_text("new")
        assert target.exists() == exists
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    (other := tmp_path / "other").mkdir()
    assert target.stat().st_mode == other.stat().st_mode


def test_a_folder_that_holds_something_is_never_replaced(tmp_path: Path) -> None:
    def fill(meanwhile: bool) -> None:
        with appearing_folder(tmp_path / "out") as hidden:
            (hidden / "new").write_text("new")
            if meanwhile:
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "old").write_text("old")

    for meanwhile in (True, False):
        with pytest.raises(InputError, match="out exists already"):
            fill(meanwhile)
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


@pytest.mark.parametrize("content", ["new", "old"])
def test_a_folder_whose_maker_was_killed_in_the_last_moment_stays_if_it_is_the_same(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / ".out.new").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text(content)
    stamp = (tmp_path / "out").stat().st_ino
    refused = pytest.raises(InputError, match="exists already") if content == "old" else nullcontext()
    with refused, appearing_folder(tmp_path / "out") as hidden:
        (hidden / "file").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_ino == stamp
    assert (tmp_path / "out" / "file").read_text() == content


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with appearing_folder(tmp_path / "out") as hidden:
            (hidden / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
