"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmprune.runtime.files import replace_folder, replacing_folder, write_json


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": 1})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    new, target = tmp_path / ".out.partial", tmp_path / "out"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        (folder / text).write_text(text)
    replace_folder(new, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "new" / "out"
    if exists:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
    with replacing_folder(target) as hidden:
        assert hidden.is_dir()
        assert not any(hidden.iterdir())
        (hidden / "new").write_text("new")
        assert target.exists() == exists
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    (other := tmp_path / "other").mkdir()
    assert target.stat().st_mode == other.stat().st_mode


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def interrupted() -> None:
        with replacing_folder(target) as hidden:
            (hidden / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
